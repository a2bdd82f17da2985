//! `explore` and `replay` on the model engine.

use super::{refused, scenario, stalemate, stderr, stdout};

/// The committed reproducer of a seeded bug, changed, in a file of its own.
fn changed(from: &str, to: &str) -> (tempfile::TempDir, String) {
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../scenarios/reproducers/flush-range-short.repro"
    );
    let text = std::fs::read_to_string(source).expect("it is committed");
    assert!(text.contains(from), "{text}");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("changed.repro");
    std::fs::write(&path, text.replacen(from, to, 1)).expect("written");
    (directory, path.to_str().expect("a name").to_owned())
}

#[test]
fn a_reproducer_that_cannot_be_replayed_says_why() {
    let (_directory, path) = changed("kernel = \"", "kernel = \"00");
    refused(
        &["replay", &path],
        &["was found on kernel 00", "--any-kernel"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"i1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &[
            "changed.repro",
            "i1 is to run, but cannot",
            "in flight",
            "explore",
        ],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"9:1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: ", "step of 9", "2 vCPUs"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"x ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: `x` in its schedule"],
    );
    // No test has so many points.
    let (_directory, path) = changed("schedule = \"", "schedule = \"0:900000000 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro", "cannot be replayed"],
    );
    let (_directory, path) = changed("schedule = \"", "unknown = \"");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: unknown field"],
    );
    refused(&["replay", "/dev/zero"], &["/dev/zero", "no regular file"]);
    let (_directory, path) = changed("test", "tset");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:17:25: program 'litmus' has no argument 'tset'"],
    );
    let (_directory, path) = changed("ending = \"T-04\"", "ending = \"foo\"");
    refused(
        &["replay", "--any-kernel", &path],
        &[
            "changed.repro:5: its ending \"foo\" names no failure",
            "T-04",
            "deadlock",
        ],
    );
}

/// In the words of scenarios, but at a line of the reproducer, and once.
#[test]
fn a_reproducer_whose_scenario_is_refused_shows_its_own_line() {
    let (_directory, path) = changed("bugs = [\"flush-", "bugs = [\"flash-");
    let output = stalemate(&["replay", "--any-kernel", &path]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let told = text.matches("no seeded bug 'flash-range-short'").count();
    assert_eq!(told, 1, "{text}");
    for words in [
        "changed.repro:20:9: no seeded bug",
        "20 │ bugs = [\"flash-range-short\"]",
        "'flush-range-short'",
    ] {
        assert!(text.contains(words), "no '{words}' in {text}");
    }
}

#[test]
fn a_file_that_is_refused_does_not_keep_replay_from_the_others() {
    let good = "scenarios/reproducers/flush-range-short.repro";
    let (_unread, refused) = changed("format = 1", "format = 9");
    // One that is only found out when it is run.
    let (_impossible, impossible) = changed("schedule = \"", "schedule = \"i1 ");
    let replay = |more: &[&str]| {
        let files = [good, &refused, good, &impossible, good];
        let output = stalemate(&[&["replay", "--brief"], more, &files].concat());
        (output.status.code(), stdout(&output), stderr(&output))
    };
    let (code, text, errors) = replay(&["--expect"]);
    assert_eq!(code, Some(2), "{errors}");
    assert_eq!(
        text.matches("✘ reproduced: T-04; 1 of 1").count(),
        3,
        "{text}"
    );
    let told: Vec<_> = errors
        .lines()
        .filter(|line| line.starts_with("error:"))
        .collect();
    assert_eq!(told.len(), 2, "{errors}");
    assert!(told[0].contains("has format 9"), "{errors}");
    assert!(told[1].contains("cannot be replayed"), "{errors}");
    // The first that is not 0 counts.
    let (code, text, _) = replay(&["--json=-"]);
    assert_eq!(code, Some(1));
    let result: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(result["exit_code"], 1);
    let replays = result["replays"].as_array().expect("a list");
    let codes: Vec<_> = replays.iter().map(|one| &one["exit_code"]).collect();
    assert_eq!(codes, [1, 2, 1, 2, 1]);
    for (index, why) in [(1, "has format 9"), (3, "in flight")] {
        let error = replays[index]["error"].as_str().expect("why");
        assert!(
            error.contains(why) && error.contains("changed.repro"),
            "{error}"
        );
    }
    assert!(replays[4]["error"].is_null());
}

#[test]
fn explore_checks_when_the_scenario_says_unless_the_command_line_does() {
    let text = "name = \"checked\"\n[program]\nname = \"litmus\"\nargs = { test = \"unmap\", pages = 2 }\n\
                [kernel]\nbugs = [\"free-before-flush\"]\n[check]\nwhen = \"every-point\"\n";
    let (directory, path) = scenario(text);
    let out = directory.path().join("out");
    let out = out.to_str().expect("UTF-8");
    let explore = |more: &[&str]| {
        let words = ["explore", &path, "--seed", "1", "--out", out, "--json"];
        let output = stalemate(&[&words[..], more].concat());
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let file = result["reproducers"][0].as_str().expect("a file");
        let reproducer = std::fs::read_to_string(file).expect("written");
        let again = stalemate(&["replay", file, "--expect", "--brief"]);
        assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
        let everywhere = stderr(&output).contains(" ends and every point by all invariants");
        let recorded = reproducer.contains("\n[check]\nwhen = \"every-point\"\n");
        (result["check"].clone(), everywhere, recorded)
    };
    assert_eq!(explore(&[]), ("every-point".into(), true, true));
    assert_eq!(explore(&["--check", "end"]), ("end".into(), false, false));
}

#[test]
fn a_failure_that_does_not_come_is_not_reproduced() {
    let (_directory, path) = changed("bugs = [\"flush-range-short\"]", "bugs = []");
    let output = stalemate(&["replay", &path, "--expect", "--brief"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("not reproduced"));
    let output = stalemate(&["replay", &path, "--brief"]);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn explore_writes_a_reproducer_that_replay_confirms() {
    let out = tempfile::Builder::new().prefix("a b").tempdir();
    let out = out.expect("a directory");
    let directory = out.path().to_str().expect("a name");
    let words = [
        "explore",
        "litmus-unmap",
        "--bug",
        "free-before-flush",
        "--seed",
        "3",
    ];
    let found = stalemate(&[&words[..], &["--out", directory]].concat());
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(1), "{text}");
    assert!(
        text.contains("T-01") && text.contains("vCPU 1") && text.contains("munmap"),
        "{text}"
    );
    let file = std::fs::read_dir(out.path()).expect("listed").next();
    let file = file.expect("a reproducer").expect("readable").path();
    let file = file.to_str().expect("a name");
    let quoted = format!("replay with: stalemate replay '{file}'\n");
    assert!(text.contains(&quoted), "{text}");
    let again = stalemate(&["replay", file, "--times", "20", "--expect", "--brief"]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stdout).contains("20 of 20 identical"));
}

/// A campaign that finds `T-01` again and again, in a directory that `meanwhile` may change once the first is on disk.
fn while_it_goes_on(
    more: &[&str],
    meanwhile: impl FnOnce(&std::process::Child, &std::path::Path),
) -> std::process::Output {
    let directory = tempfile::tempdir().expect("a directory");
    let out = directory.path().join("out");
    let words = ["explore", "litmus-unmap", "--bug", "free-before-flush"];
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(words)
        .args(["--seed", "3", "--keep-going", "--out"])
        .arg(&out)
        .args(more)
        .current_dir(super::REPOSITORY)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it runs");
    let started = std::time::Instant::now();
    let first = out.join("litmus-unmap-t-01.repro");
    while !first.exists() {
        assert!(started.elapsed().as_secs() < 60, "nothing is written");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    meanwhile(&child, &out);
    child.wait_with_output().expect("it ends")
}

#[test]
fn what_is_found_is_told_where_it_can_no_longer_be_written() {
    let output = while_it_goes_on(&["--time-limit", "3s"], |_, out| {
        std::fs::remove_dir_all(out).expect("removed");
        std::fs::write(out, "").expect("written");
    });
    let (text, errors) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(1), "{text}{errors}");
    assert!(errors.contains("out: cannot be written"), "{errors}");
    for words in ["✘ ", "schedules fail", "T-01", "\nschedule = \""] {
        assert!(text.contains(words), "no '{words}' in {text}");
    }
    // What is printed is the reproducer.
    let from = text.find("# A reproducer").expect("it is printed");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("saved.repro");
    std::fs::write(&file, &text[from..]).expect("written");
    let file = file.to_str().expect("a name");
    let again = stalemate(&["replay", file, "--expect", "--brief"]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
}

#[test]
fn a_campaign_that_is_killed_leaves_what_it_has_found() {
    while_it_goes_on(&["--schedules", "1000000000"], |child, out| {
        let pid = child.id().to_string();
        let killed = std::process::Command::new("kill")
            .args(["-KILL", &pid])
            .status();
        assert!(killed.expect("kill runs").success());
        let file = out.join("litmus-unmap-t-01.repro");
        let file = file.to_str().expect("a name");
        let again = stalemate(&["replay", file, "--expect", "--brief"]);
        assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    });
}

#[test]
fn a_violation_counts_where_its_result_cannot_be_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let out = directory.path().to_str().expect("a name");
    let words = ["explore", "litmus-unmap", "--bug", "free-before-flush"];
    let more = ["--seed", "3", "--out", out, "--json", "/dev/full"];
    let output = stalemate(&[&words[..], &more].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write /dev/full"));
    assert!(stdout(&output).contains("T-01"), "{}", stdout(&output));
}

#[test]
fn where_no_schedule_comes_to_its_end_nothing_is_said_to_be_well() {
    let started = std::time::Instant::now();
    let words = ["explore", "unmap-race", "--seed", "1", "--time-limit", "2s"];
    let output = stalemate(&[&words[..], &["--check", "every-point"]].concat());
    let (text, errors) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(2), "{text}{errors}");
    assert!(
        text.starts_with("– no schedule came to its end\n"),
        "{text}"
    );
    assert!(!text.contains('✔') && text.contains("explored   0 schedules"));
    assert!(errors.contains("give a longer --time-limit"), "{errors}");
    // The limit, and all the time that a busy machine takes to boot.
    assert!(started.elapsed().as_secs() < 15, "{:?}", started.elapsed());
}

#[test]
fn one_seed_gives_one_campaign_whatever_the_jobs() {
    let explore = |jobs: &str| {
        let words = [
            "explore",
            "litmus-switch",
            "--seed",
            "9",
            "--schedules",
            "300",
            "--jobs",
            jobs,
        ];
        let output = stalemate(&[&words[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (
            result["points"].clone(),
            result["events"].clone(),
            result["conflicting_pairs"].clone(),
        )
    };
    assert_eq!(explore("1"), explore("2"));
}

#[test]
fn what_the_model_cannot_contain_is_left_to_vcpus() {
    for scenario in ["crash", "trace-git"] {
        let output = stalemate(&["explore", scenario, "--schedules", "1"]);
        assert_eq!(output.status.code(), Some(2), "{scenario}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("use --engine kvm"));
    }
}

#[test]
fn three_members_that_wait_for_each_other_get_to_the_start() {
    let words = ["explore", "unmap-race-short", "--vcpus", "4", "--seed", "1"];
    let output = stalemate(&[&words[..], &["--schedules", "20"]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
}

#[test]
fn a_test_that_is_too_long_is_no_livelock() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("long.toml");
    let text = "[machine]\nvcpus = 1\n[program]\nname = \"cow-fork\"\nargs = { rounds = 600 }\n";
    std::fs::write(&file, text).expect("written");
    let path = file.to_str().expect("a name");
    refused(
        &["explore", path, "--schedules", "1", "--seed", "1"],
        &["not over after", "too long"],
    );
}

/// The first schedules already fail where shootdowns are left out, and where they are not none does.
#[test]
fn stress_catches_what_is_not_flushed() {
    let directory = tempfile::tempdir().expect("a directory");
    let out = directory.path().to_str().expect("UTF-8");
    let explore = |scenario, schedules, more: &[&str]| {
        let fixed = ["explore", scenario, "--schedules", schedules];
        let common = ["--seed", "1", "--out", out];
        stalemate(&[&fixed[..], &common, more].concat())
    };
    for (scenario, schedules) in [
        ("stress-short", "300"),
        ("stress", "40"),
        ("pressure", "20"),
    ] {
        let clean = explore(scenario, schedules, &[]);
        assert_eq!(clean.status.code(), Some(0), "{}", stdout(&clean));
    }
    for bug in ["shootdown-skip-remote", "free-before-flush"] {
        let found = explore("stress-short", "300", &["--bug", bug]);
        assert_eq!(found.status.code(), Some(1), "{}", stdout(&found));
        assert!(stdout(&found).contains("T-01"), "{}", stdout(&found));
    }
}
