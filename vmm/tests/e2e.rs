//! End to end: scenarios on a real host, from the command line to the verdict.
//!
//! `STALEMATE_E2E_HOST=kvm` (the default) runs the built binary on this host's /dev/kvm; `lab` runs
//! `scripts/lab -- …` with the statically linked binary that `STALEMATE_LAB_BINARY` names. A host
//! that cannot run machines fails every test here with the name of what is missing: a test that
//! quietly does nothing is a lie.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde_json::Value;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const MODES: [&str; 2] = ["hardware", "controlled"];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Host {
    Kvm,
    Lab,
}

fn host() -> Host {
    match std::env::var("STALEMATE_E2E_HOST").as_deref() {
        Err(_) | Ok("" | "kvm") => Host::Kvm,
        Ok("lab") => Host::Lab,
        Ok(other) => panic!("STALEMATE_E2E_HOST={other}: 'kvm' or 'lab'"),
    }
}

/// Runs `stalemate WORDS…` on the chosen host, at the root of the repository. A triple fault in the lab may be
/// QEMU's (docs/lab.md, "One thread or several"): it is one if it comes three times.
fn stalemate(words: &[&str]) -> Output {
    let mut output = once(words);
    for _ in 0..2 {
        let crashed = output.status.code() == Some(4) && text(&output).contains("triple fault");
        if host() != Host::Lab || !crashed {
            break;
        }
        eprintln!("again, for a triple fault in the lab: {words:?}");
        output = once(words);
    }
    output
}

/// One machine at a time: vCPUs that share a CPU with another machine's wait for each other's time slices at
/// every shootdown.
fn once(words: &[&str]) -> Output {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // A test that failed while it held the lock has left no machine behind.
    let _machine = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = match host() {
        Host::Kvm => Command::new(env!("CARGO_BIN_EXE_stalemate")),
        Host::Lab => {
            let mut lab = Command::new(Path::new(REPOSITORY).join("scripts/lab"));
            lab.args(["--quiet", "--timeout", "600", "--"]);
            lab
        }
    };
    command
        .args(words)
        .current_dir(REPOSITORY)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

fn text(output: &Output) -> String {
    format!(
        "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// What `doctor` says of the host, once.
fn doctor() -> &'static Value {
    static DOCTOR: OnceLock<Value> = OnceLock::new();
    DOCTOR.get_or_init(|| {
        let output = stalemate(&["doctor", "--json"]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "this host runs no machine:\n{}",
            text(&output)
        );
        serde_json::from_slice(&output.stdout).expect("doctor prints JSON")
    })
}

/// The JSON result of `run`, which must end with `exit`.
#[track_caller]
fn run(exit: i32, words: &[&str]) -> Value {
    doctor();
    let output = stalemate(&[&["run"], words, &["--json"]].concat());
    assert_eq!(
        output.status.code(),
        Some(exit),
        "run {words:?}: {}",
        text(&output)
    );
    let result: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("run {words:?}: {error}: {}", text(&output)));
    assert_eq!(result["schema"], 1);
    assert_eq!(result["exit_code"], exit);
    result
}

/// A clean run in which invariants were really checked.
#[track_caller]
fn clean(words: &[&str]) -> Value {
    let result = run(0, words);
    assert_eq!(result["verdict"], "held");
    assert_eq!(result["program_status"], 0);
    assert_eq!(result["violations"], Value::Array(Vec::new()));
    let invariants = result["invariants"].as_array().expect("a list");
    let checked = invariants
        .iter()
        .filter(|one| one["examined"].as_u64() > Some(0))
        .count();
    assert!(
        checked >= 5,
        "only {checked} invariants were decided: {invariants:?}"
    );
    result
}

#[test]
fn doctor_names_the_kind_of_host() {
    let kind = doctor()["host"]["kind"].as_str().expect("a kind");
    match host() {
        Host::Lab => assert_eq!(kind, "lab"),
        Host::Kvm => {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("cpuinfo");
            let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
            let expected = if has("vmx") || has("svm") {
                "hardware"
            } else {
                "emulating"
            };
            assert_eq!(kind, expected);
        }
    }
}

#[test]
fn smoke_is_clean_in_both_interrupt_modes() {
    for mode in MODES {
        for vcpus in ["1", "2", "4"] {
            let result = clean(&["smoke", "--interrupts", mode, "--vcpus", vcpus]);
            assert_eq!(result["scenario"]["interrupts"], mode);
            assert_eq!(result["scenario"]["vcpus"].to_string(), vcpus);
            for part in ["create", "load", "boot", "run", "checks"] {
                assert!(
                    result["timings_ns"][part].as_u64() > Some(0),
                    "{part}: {result}"
                );
            }
        }
    }
}

#[test]
fn smoke_runs_on_every_number_of_vcpus() {
    clean(&["smoke", "--vcpus", "3"]);
    clean(&["smoke", "--vcpus", "16", "--memory", "128M"]);
}

#[test]
fn smoke_runs_in_the_least_memory() {
    clean(&["smoke", "--vcpus", "1", "--memory", "16M"]);
}

#[test]
fn smoke_holds_at_every_point() {
    let result = clean(&["smoke", "--check", "every-point", "--vcpus", "2"]);
    assert!(
        result["points_checked"].as_u64() > Some(100),
        "{}",
        result["points_checked"]
    );
}

#[test]
fn unmap_race_is_clean() {
    for mode in MODES {
        clean(&["unmap-race", "--interrupts", mode]);
    }
}

#[test]
fn cow_fork_is_clean() {
    for mode in MODES {
        clean(&["cow-fork", "--interrupts", mode]);
    }
}

#[test]
fn mprotect_race_is_clean() {
    for mode in MODES {
        clean(&["mprotect-race", "--interrupts", mode]);
    }
}

#[test]
fn recorded_traces_are_clean_and_say_what_became_of_their_calls() {
    for scenario in ["trace-python3", "trace-rustc", "trace-git"] {
        let result = clean(&[scenario, "--vcpus", "4"]);
        assert!(
            result["trace"].is_object(),
            "{scenario}: {}",
            result["trace"]
        );
    }
}

#[test]
fn a_skipped_shootdown_is_caught_where_hardware_can_show_it() {
    let words = ["unmap-race", "--bug", "shootdown-skip-remote"];
    let doctor = doctor();
    if doctor["shows_stale_translations"] == true {
        let result = run(1, &[&words[..], &["--runs", "20"]].concat());
        let violations = result["violations"].as_array().expect("a list");
        let probe = violations
            .iter()
            .find(|violation| violation["id"] == "data-probe");
        let title = probe
            .and_then(|probe| probe["title"].as_str())
            .unwrap_or_default();
        assert!(
            title.contains("no longer this page's own"),
            "{violations:?}"
        );
    } else {
        println!("this host emulates CPL 0: the bug cannot show itself; the report must say so");
        let result = run(0, &words);
        let notes = result["notes"].to_string();
        assert!(notes.contains("shootdown-skip-remote"), "{notes}");
        assert!(notes.contains("cannot show"), "{notes}");
        assert!(notes.contains("scripts/lab"), "{notes}");
    }
}

#[test]
fn twenty_runs_without_a_seeded_bug_are_clean() {
    let result = clean(&["unmap-race", "--runs", "20"]);
    assert_eq!(result["runs_done"], 20);
}

#[test]
fn inspect_shows_a_page_table_tree_as_text_and_as_json() {
    doctor();
    let words = ["inspect", "smoke", "--at", "pte-install:5"];
    let output = stalemate(&words);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let shown = String::from_utf8_lossy(&output.stdout);
    for word in [
        "pte-install",
        "on vCPU ",
        "Page tables of mm 1",
        "L1[",
        "P W U",
    ] {
        assert!(shown.contains(word), "no '{word}' in:\n{shown}");
    }
    let output = stalemate(&[&words[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let result: Value = serde_json::from_slice(&output.stdout).expect("inspect prints JSON");
    assert_eq!(result["kind"], "inspect");
    assert_eq!(result["stopped_at"]["point"], "pte-install");
}

#[test]
fn inspect_pauses_after_a_time_and_follows_an_address() {
    doctor();
    let output = stalemate(&[
        "inspect",
        "unmap-race",
        "--after",
        "20ms",
        "--gva",
        "0x400000",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("0x400000"), "{shown}");
}

#[test]
fn a_point_that_is_never_passed_is_said_to_be() {
    doctor();
    let output = stalemate(&["inspect", "smoke", "--at", "mm-exit:100000"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("was passed"), "{}", text(&output));
}

#[test]
fn a_run_that_does_not_finish_is_a_failed_guest() {
    let result = run(4, &["unmap-race", "--timeout", "1ms"]);
    assert_eq!(result["verdict"], "crashed");
    assert!(
        result["crash"]["reason"]
            .to_string()
            .contains("did not finish in"),
        "{result}"
    );
    assert_eq!(result["crash"]["kind"], "timeout");
    let vcpus = result["crash"]["vcpus"].as_array().expect("vCPUs");
    assert!(!vcpus.is_empty());
    for vcpu in vcpus {
        assert!(vcpu["regs"].is_object(), "{vcpu}");
        assert_ne!(vcpu["backtrace"].as_array().map_or(0, Vec::len), 0);
    }

    let output = stalemate(&["run", "unmap-race", "--timeout", "1ms"]);
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(shown.matches("did not finish in").count(), 1, "{shown}");
    assert!(shown.contains("backtrace:"), "{shown}");
    assert!(shown.contains("--timeout gives it more"), "{shown}");
}

#[test]
fn results_go_to_a_directory_and_may_be_replaced() {
    doctor();
    let directory = tempfile::Builder::new()
        .prefix("e2e-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a temporary directory");
    let out: PathBuf = directory.path().join("smoke");
    let words = ["run", "smoke", "--out", out.to_str().expect("UTF-8")];
    for _ in 0..2 {
        let output = stalemate(&words);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    }
    let read = |name: &str| std::fs::read_to_string(out.join(name)).expect(name);
    let result: Value = serde_json::from_str(&read("result.json")).expect("JSON");
    assert_eq!(result["verdict"], "held");
    assert!(read("report.txt").starts_with("✔ all invariants held"));
    assert_eq!(read("serial.log"), result["serial"].as_str().expect("text"));
}

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

/// vCPUs that run at once, disturbed, and judged by their merged streams.
mod parallel {
    use super::*;

    /// What the merged streams of a run say of themselves: everything was judged.
    #[track_caller]
    fn judged(result: &Value) {
        let stream = &result["stream"];
        assert!(stream["events"].as_u64() > Some(1000), "{stream}");
        assert_eq!(stream["unjudged"], 0, "{stream}");
        assert_eq!(stream["broken"], Value::Null, "{stream}");
        assert_eq!(stream["given_up"], Value::Array(Vec::new()), "{stream}");
    }

    #[test]
    fn vcpus_held_at_flush_points_break_nothing_and_what_was_held_is_told() {
        let delays = ["--delay", "flush-dispatch=0..300us", "--delay"];
        let until = "pte-clear@0:p0.2=until:fault-enter@1,1ms";
        for scenario in ["unmap-race", "mprotect-race"] {
            let words = [
                &[scenario, "--monitor", "--seed", "5"][..],
                &delays,
                &[until],
            ]
            .concat();
            let result = clean(&words);
            judged(&result);
            let rules = result["disturbances"].as_array().expect("a list");
            assert_eq!(rules[0]["rule"], "flush-dispatch=0..300us");
            assert!(rules[0]["hits"].as_u64() > Some(0), "{rules:?}");
            assert!(rules[0]["held_ns"].as_u64() > Some(0), "{rules:?}");
            assert_eq!(rules[0]["hits"], rules[0]["passages"]);
            assert_eq!(rules.len(), 2);
        }
    }

    #[test]
    fn ipis_that_come_twice_late_or_out_of_order_are_survived() {
        for fault in [
            "any:p0.4=dup",
            "any:p0.4=reorder",
            "any:every3=delay:0..300us",
        ] {
            for scenario in ["unmap-race", "mprotect-race"] {
                let controlled = ["--interrupts", "controlled", "--ipi", fault];
                let result =
                    clean(&[&[scenario, "--monitor", "--seed", "5"][..], &controlled].concat());
                judged(&result);
                assert!(
                    result["disturbances"][0]["hits"].as_u64() > Some(0),
                    "{fault}: {}",
                    result["disturbances"]
                );
            }
        }
    }

    /// Every run of several is a machine of its own: what one leaves in a TLB is tagged with a VM that is gone.
    #[test]
    fn runs_of_one_process_share_nothing() {
        let result = clean(&["mprotect-race", "--monitor", "--runs", "3"]);
        judged(&result);
        assert_eq!(result["runs_done"], 3);
    }

    /// The program cannot see it where CPL 0 is emulated; the streams of its vCPUs tell.
    #[test]
    fn a_skipped_shootdown_is_found_by_the_merged_streams_on_every_host() {
        // Not in every run: a page fault drops what it should have flushed.
        let words = ["unmap-race", "--monitor", "--runs", "60", "--bug"];
        let found = || {
            let result = run(1, &[&words[..], &["shootdown-skip-remote"]].concat());
            let violations = result["violations"].as_array().expect("a list");
            violations.iter().find(|one| one["id"] == "T-01").cloned()
        };
        // Hardware that keeps stale translations shows them to the program, and what the order of the events leaves
        // open is decided by that; but not where the program meets other pages.
        let confirmed = |found: &Value| found.to_string().contains("confirmed by hardware");
        let found = match host() {
            Host::Lab => (0..8).find_map(|_| found().filter(confirmed)),
            Host::Kvm => found(),
        };
        let found = found.expect("T-01, confirmed where hardware can");
        assert!(
            found["at"].to_string().contains("merged streams"),
            "{found}"
        );
        assert!(
            found["title"]
                .to_string()
                .contains("to a frame that is freed"),
            "{found}"
        );
    }

    #[test]
    fn a_dropped_ipi_hangs_the_guest_and_not_the_tool() {
        let words = ["mprotect-race", "--interrupts", "controlled", "--ipi"];
        let drop = ["shootdown:nth3=drop", "--timeout", "180s"];
        let result = run(4, &[&words[..], &drop].concat());
        assert_eq!(result["crash"]["kind"], "hang", "{}", result["crash"]);
        let waits = result["crash"]["waits"].to_string();
        for words in [
            "to acknowledge its shootdown",
            "1 shootdown IPIs from vCPU",
            "were dropped",
        ] {
            assert!(waits.contains(words), "no '{words}' in {waits}");
        }
    }

    #[test]
    fn disturbances_that_no_machine_can_have_are_refused() {
        for (words, why) in [
            (["--delay", "flush-sync@7=1ms"], "no vCPU 7"),
            (["--delay", "flush-sink=1ms"], "'flush-sync'"),
            (["--ipi", "any=drop"], "--interrupts controlled"),
        ] {
            let output = stalemate(&[&["run", "smoke"][..], &words].concat());
            assert_eq!(output.status.code(), Some(2), "{}", text(&output));
            assert!(text(&output).contains(why), "{}", text(&output));
        }
    }
}
