//! `explore` and `replay` on vCPUs.

use serde_json::Value;

use super::{REPOSITORY, doctor, stalemate, text};

/// Every seeded bug has a minimised reproducer, which replays bit for bit on both engines.
#[test]
fn every_reproducer_replays_bit_for_bit_on_both_engines() {
    doctor();
    let path = |bug: &abi::bug::Bug| format!("scenarios/reproducers/{}.repro", bug.name());
    let all: Vec<String> = abi::bug::Bug::ALL.iter().map(path).collect();
    // The model has no instructions to stop between.
    let by_points = |file: &&String| {
        let text = std::fs::read_to_string(format!("{REPOSITORY}/{file}"))
            .expect("a reproducer of every bug");
        !text.contains("\nwindow = ")
    };
    let on_model: Vec<String> = all.iter().filter(by_points).cloned().collect();
    assert_eq!(on_model.len(), all.len() - 1);
    for (engine, times, files) in [("model", "50", &on_model), ("kvm", "20", &all)] {
        let mut words = vec!["replay", "--engine", engine, "--times", times];
        words.extend(["--expect", "--brief"]);
        words.extend(files.iter().map(String::as_str));
        words.push("--json");
        let output = stalemate(&words);
        assert_eq!(output.status.code(), Some(0), "{engine}: {}", text(&output));
        let result: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let replays = result["replays"].as_array().expect("a list");
        assert_eq!(replays.len(), files.len());
    }
}

/// On vCPUs, the litmus test of its reproducer finds every seeded bug, and nothing without one.
#[test]
fn explore_finds_every_seeded_bug_on_vcpus_and_nothing_without_one() {
    doctor();
    let explore = |scenario: &str, more: &[&str]| {
        let words = ["explore", scenario, "--engine", "kvm", "--seed", "1"];
        stalemate(&[&words[..], more].concat())
    };
    let clean = explore("litmus-unmap", &["--schedules", "5", "--verify", "2"]);
    assert_eq!(clean.status.code(), Some(0), "{}", text(&clean));
    for bug in abi::bug::Bug::ALL {
        let file = format!("{REPOSITORY}/scenarios/reproducers/{}.repro", bug.name());
        let known = std::fs::read_to_string(file).expect("a reproducer of every bug");
        let known: toml::Table = known.parse().expect("TOML");
        let scenario: toml::Table = known["scenario"]
            .as_str()
            .expect("text")
            .parse()
            .expect("TOML");
        let out = tempfile::tempdir().expect("a directory");
        let out = out.path().to_str().expect("a name");
        let mut more = vec!["--bug", bug.name(), "--schedules", "2000", "--out", out];
        if let Some(window) = known.get("window") {
            more.extend(["--window", window.as_str().expect("text")]);
        }
        // One of them shows in random walks, not in few preemptions.
        if known["found_by"]
            .as_str()
            .expect("text")
            .starts_with("Random")
        {
            more.extend(["--strategy", "random"]);
        }
        let found = explore(scenario["name"].as_str().expect("text"), &more);
        assert_eq!(
            found.status.code(),
            Some(1),
            "{}: {}",
            bug.name(),
            text(&found)
        );
        assert!(text(&found).contains("replay with:"), "{}", text(&found));
    }
}
