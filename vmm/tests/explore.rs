//! Exploration from outside: two engines, failpoints, traces. Tests of vCPUs need /dev/kvm: without it
//! they fail and say so.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use common::{ran, stalemate};

fn text_of(output: &Output) -> String {
    format!(
        "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs `words`, which must end with `exit` and say each of `essential`.
#[track_caller]
fn says(exit: i32, words: &[&str], essential: &[&str]) -> String {
    let text = text_of(&stalemate(words));
    assert!(
        text.starts_with(&format!("exit Some({exit})\n")),
        "{words:?}: not {exit}: {text}"
    );
    for word in essential {
        assert!(
            text.contains(word),
            "{words:?} does not say '{word}': {text}"
        );
    }
    text
}

#[track_caller]
fn json(exit: i32, words: &[&str]) -> Value {
    let output = stalemate(&[words, &["--json"]].concat());
    assert_eq!(
        output.status.code(),
        Some(exit),
        "{words:?}: {}",
        text_of(&output)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A directory for reproducers, and its name.
fn directory() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let name = directory.path().to_str().expect("UTF-8").to_owned();
    (directory, name)
}

/// The reproducers in `directory`.
fn reproducers(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("listed");
    let paths = entries.map(|entry| entry.expect("readable").path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "repro"))
        .collect()
}

#[test]
fn what_the_model_finds_is_confirmed_on_vcpus() {
    let (out, name) = directory();
    let words = ["explore", "litmus-unmap", "--engine", "both", "--seed", "1"];
    let bug = ["--bug", "shootdown-skip-remote", "--out", &name];
    let found = json(1, &[&words[..], &bug].concat());
    let violation = &found["confirmed"]["violations"][0];
    let confirmation = &violation["confirmation"];
    assert_eq!(confirmation["same_ending"], true, "{found}");
    assert_eq!(confirmation["divergence"], Value::Null);
    assert!(confirmation["events"].as_u64() > Some(10));
    assert_eq!(confirmation["events"], confirmation["same_events"]);

    let file = reproducers(out.path()).remove(0);
    let file = file.to_str().expect("UTF-8");
    let replay = ["replay", file, "--engine", "both", "--brief", "--expect"];
    says(0, &replay, &["confirmed on vCPUs: same ending"]);
    let replayed = json(0, &replay);
    assert_eq!(replayed["replays"][0]["confirmation"], *confirmation);
}

#[test]
fn clean_schedules_are_confirmed_on_vcpus() {
    confirmed("litmus-switch", 300);
}

/// Not only races of a few steps: programs that work for a while, and one whose test begins with itself.
#[test]
fn every_kind_of_program_is_the_same_on_both_engines() {
    for scenario in [
        "smoke",
        "unmap-race-short",
        "mprotect-race-short",
        "cow-fork-short",
    ] {
        confirmed(scenario, 100);
    }
}

#[test]
fn two_tasks_that_wait_for_another_cpu_let_it_run() {
    // Both members of smoke's team wait on CPU 1 for the leader: they kept CPU 0 off for ever.
    let words = ["explore", "smoke", "--seed", "7", "--schedules", "20"];
    json(0, &words);
}

fn confirmed(scenario: &str, schedules: u32) {
    let schedules = schedules.to_string();
    let words = ["explore", scenario, "--engine", "both", "--seed", "4"];
    let more = ["--schedules", &schedules, "--confirm", "5"];
    let result = json(0, &[&words[..], &more].concat());
    let clean = &result["confirmed"]["clean"];
    assert_eq!(
        (&clean["asked"], &clean["compared"]),
        (&5.into(), &5.into())
    );
    assert_eq!(clean["diverged"], Value::Array(Vec::new()));
    assert!(clean["events"].as_u64() > Some(100), "{clean}");
}

#[test]
fn a_host_without_kvm_is_told_before_anything_is_explored() {
    let script = "mount -t tmpfs tmpfs /dev && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    command.arg(env!("CARGO_BIN_EXE_stalemate"));
    let words = [
        "explore",
        "litmus-unmap",
        "--engine",
        "both",
        "--schedules",
        "1",
    ];
    let output = ran(&mut command, &words);
    let text = text_of(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    let lab = "scripts/lab -- explore litmus-unmap --engine both";
    assert!(text.contains("no /dev/kvm") && text.contains(lab), "{text}");
    assert!(!text.contains("explored"), "{text}");
}

#[test]
fn confirm_without_a_second_engine_is_refused() {
    let words = ["explore", "litmus-unmap", "--confirm", "3"];
    says(2, &words, &["--confirm", "--engine both"]);
}

/// Also what an emulating host once did otherwise: an IPI that came to an idle vCPU while it handled another.
#[test]
fn the_correct_kernel_survives_failures_on_both_engines() {
    let words = ["explore", "litmus-fork", "--engine", "both", "--seed", "2"];
    let any = ["--fail-any", "frame-alloc", "--fail-any", "slab-alloc"];
    let more = ["--schedules", "400", "--confirm", "8"];
    let result = json(0, &[&words[..], &any, &more].concat());
    assert_eq!(
        result["states_checked"], 400,
        "a leak shows at the end only"
    );
    let clean = &result["confirmed"]["clean"];
    assert_eq!(clean["compared"], 8, "{clean}");
    assert_eq!(clean["diverged"], Value::Array(Vec::new()));
}

/// A failure of an allocation that the bug has nothing to do with is not in the reproducer; one that is
/// asked for in the scenario is, and its replay has it.
#[test]
fn reproducers_carry_the_failures_that_they_need() {
    let (out, name) = directory();
    let scenario = out.path().join("failing.toml");
    let text = "[machine]\nvcpus = 2\n[program]\nname = \"litmus\"\nargs = { test = \"unmap\" }\n\
                [kernel]\nbugs = [\"free-before-flush\"]\nfail = [\"frame-alloc@1:4000000\"]\n";
    std::fs::write(&scenario, text).expect("written");
    let path = scenario.to_str().expect("UTF-8");
    let words = ["explore", path, "--fail", "slab-alloc@0:1", "--seed", "1"];
    let found = json(1, &[&words[..], &["--out", &name]].concat());
    let both = serde_json::json!(["frame-alloc@1:4000000", "slab-alloc@0:1"]);
    assert_eq!(found["failures"][0]["fails"], both);
    let file = reproducers(out.path()).remove(0);
    let reproducer = std::fs::read_to_string(&file).expect("readable");
    assert!(!reproducer.contains("slab-alloc"), "{reproducer}");

    // By hand: the call that begins the race fails, and what is left of the schedule is impossible.
    let failing = reproducer.replace("bugs = [", "fail = [\"slab-alloc@0:1\"]\nbugs = [");
    assert_ne!(failing, reproducer);
    std::fs::write(&file, failing).expect("written");
    let file = file.to_str().expect("UTF-8");
    says(2, &["replay", file], &["is to run, but cannot"]);
    let unarmed = reproducer.replace("bugs = [", "fail = [\"slab-alloc@0:99\"]\nbugs = [");
    std::fs::write(file, unarmed).expect("written");
    says(0, &["replay", file, "--expect"], &["1 of 1 identical"]);
}

#[test]
fn what_cannot_fail_is_refused_with_the_names() {
    let words = |fail: &'static str| ["explore", "litmus-unmap", "--fail", fail];
    says(
        2,
        &words("slab@0:1"),
        &["no failpoint 'slab'", "frame-alloc, slab-alloc"],
    );
    says(2, &words("slab-alloc@7:1"), &["no vCPU 7", "0, 1"]);
    says(2, &words("slab-alloc@0:0"), &["NAME@VCPU:N"]);
    let any = ["explore", "litmus-unmap", "--fail-any", "x"];
    says(2, &any, &["no failpoint 'x'", "frame-alloc, slab-alloc"]);
    says(0, &["list", "failpoints"], &["frame-alloc", "slab-alloc"]);

    let (out, _) = directory();
    let path = out.path().join("failing.toml");
    let scenario = "[program]\nname = \"smoke\"\n[kernel]\nfail = [\"slab-alloc@0:1\"]\n";
    std::fs::write(&path, scenario).expect("written");
    let path = path.to_str().expect("UTF-8");
    says(2, &["run", path], &["slab-alloc@0:1", "stalemate explore"]);
    let inspect = ["inspect", path, "--at", "pte-install"];
    says(2, &inspect, &["slab-alloc@0:1", "stalemate explore"]);
}

/// Records of a trace with this `ph`.
fn records<'a>(trace: &'a Value, ph: &str) -> Vec<&'a Value> {
    let all = trace["traceEvents"].as_array().expect("a list");
    all.iter().filter(|record| record["ph"] == ph).collect()
}

#[test]
fn an_execution_is_drawn_for_perfetto() {
    let (out, name) = directory();
    let file = |name: &str| out.path().join(name).to_str().expect("UTF-8").to_owned();
    let read = |path: &str| -> Value {
        let text = std::fs::read_to_string(path).expect("written");
        serde_json::from_str(&text).expect("JSON")
    };
    let (failing, again, clean) = (file("failing.json"), file("again.json"), file("clean.json"));
    let words = ["explore", "litmus-unmap", "--seed", "1", "--trace"];
    let bug = ["--bug", "shootdown-skip-remote", "--out", &name];
    let found = json(1, &[&words[..], &[&failing], &bug].concat());
    assert_eq!(found["trace"], failing.as_str());
    let drawn = read(&failing);
    assert_eq!(records(&drawn, "B").len(), records(&drawn, "E").len());
    let failure = records(&drawn, "i")
        .into_iter()
        .find(|record| record["s"] == "g");
    assert!(
        failure.expect("it failed")["name"]
            .to_string()
            .contains("T-01")
    );

    // The reproducer's execution is the same, to the last record.
    let reproducer = reproducers(out.path()).remove(0);
    let reproducer = reproducer.to_str().expect("UTF-8");
    says(1, &["replay", reproducer, "--trace", &again], &["perfetto"]);
    assert_eq!(read(&again), drawn);

    let fork = ["explore", "litmus-fork", "--schedules", "20", "--seed", "1"];
    says(
        0,
        &[&fork[..], &["--trace", &clean]].concat(),
        &["perfetto"],
    );
    let arrows = records(&read(&clean), "f").len();
    assert!(arrows > 0, "a clean schedule has shootdowns");

    let before = std::fs::read_to_string(reproducer).expect("still there");
    let swallowed = ["replay", "--trace", reproducer, reproducer];
    says(2, &swallowed, &["--trace", "would overwrite a reproducer"]);
    let explore = [&words[..], &[reproducer]].concat();
    says(2, &explore, &["would overwrite a reproducer"]);
    assert_eq!(
        std::fs::read_to_string(reproducer).expect("still there"),
        before
    );
    let two = ["replay", reproducer, reproducer, "--trace", &again];
    says(2, &two, &["one execution"]);
    let nowhere = ["replay", reproducer, "--trace", "/absent/x.json"];
    says(2, &nowhere, &["/absent/x.json"]);
}

/// With the processor's own TLB, a replay lets the program go on and says what the hardware shows.
#[test]
fn a_replay_on_vcpus_asks_the_hardware() {
    let (out, name) = directory();
    let words = [
        "explore",
        "litmus-unmap",
        "--engine",
        "kvm",
        "--param",
        "tlb=hw",
    ];
    let bug = [
        "--bug",
        "shootdown-skip-remote",
        "--seed",
        "1",
        "--out",
        &name,
    ];
    says(1, &[&words[..], &bug].concat(), &["T-01"]);
    let file = reproducers(out.path()).remove(0);
    let file = file.to_str().expect("UTF-8");
    // As explore prints the command: the model could not run it.
    let replay = ["replay", file, "--expect", "--brief"];
    let hardware = &json(0, &replay)["replays"][0]["hardware"];
    let said = hardware["text"].as_str().expect("a text");
    let expected = match hardware["shows_it"].as_bool().expect("a flag") {
        true => "confirmed by hardware: vCPU 1",
        false => "its absence proves nothing",
    };
    assert!(said.contains(expected), "{said}");
}

#[test]
fn a_vcpu_that_hangs_is_told_with_its_function_and_the_schedule_before() {
    let (directory, out) = directory();
    let file = directory.path().join("hang.toml");
    let text =
        "[program]\nname = \"crash\"\nargs = { how = \"hang\" }\n[limits]\nwatchdog = \"1s\"\n";
    std::fs::write(&file, text).expect("written");
    let file = file.to_str().expect("UTF-8");
    let words = ["explore", file, "--engine", "kvm", "--seed", "7"];
    for (strategy, which) in [
        ("random", "execution 0 (Random { mean: 8 } seed 7)"),
        ("pct", "the execution that measures (round robin)"),
    ] {
        says(
            4,
            &[&words[..], &["--strategy", strategy, "--out", &out]].concat(),
            &[
                &format!("{which} hangs after schedule = \""),
                "has not reached a scheduling point in 1 s (at rip 0xffff",
                " in guest_kernel::",
            ],
        );
    }
}
