//! What the scenarios of the repository come to, and which host runs them.

use super::{Host, MODES, clean, doctor, host, run, stalemate, text};

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

/// Where the processor has PCIDs they are used; elsewhere that is said before anything runs.
#[test]
fn pcids_are_used_or_refused() {
    doctor();
    let output = stalemate(&["run", "smoke", "--param", "pcid=on"]);
    let text = text(&output);
    match output.status.code() {
        Some(0) => assert!(text.contains("all invariants held"), "{text}"),
        Some(3) => assert!(text.contains("CPUID.01H:ECX bit 17"), "{text}"),
        _ => panic!("{text}"),
    }
    clean(&["smoke", "--param", "pcid=off"]);
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

/// What a run under pressure wrote of itself.
#[track_caller]
fn frames_reclaimed(result: &serde_json::Value) -> u64 {
    let serial = result["serial"].as_str().expect("text");
    let words: Vec<&str> = serial.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "frames");
    let number = at.and_then(|at| words[at - 1].parse().ok());
    number.unwrap_or_else(|| panic!("no number of frames: {serial}"))
}

#[test]
fn what_is_swapped_out_comes_back() {
    let result = clean(&["pressure"]);
    assert!(frames_reclaimed(&result) >= 32, "{result}");
    // Not even the last frame and the last slot are missing afterwards: the invariants count them.
    let result = clean(&["pressure-oom", "--timeout", "5m"]);
    let serial = result["serial"].as_str().expect("text");
    assert!(serial.contains("out of memory for address"), "{serial}");
    assert!(frames_reclaimed(&result) > 0, "{result}");
}

/// A disk that does not write loses nothing, one that does not read or spoils data is told; the machine lives on.
#[test]
fn a_disk_that_fails_ends_in_defined_errors() {
    doctor();
    let directory = tempfile::Builder::new()
        .prefix("e2e-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a temporary directory");
    let with = |faults: &str| {
        let file = directory.path().join("faults.toml");
        // The soft TLB keeps the program's own pages out of it: four pages, so four requests to write come first.
        let text = format!(
            "[machine]\nmemory = \"16M\"\n[program]\nname = \"pressure\"\nargs = {{ pages = 4, passes = 1 }}\n\
             [kernel]\nparams = {{ swap_slots = \"16\", tlb = \"soft\" }}\n[disk]\nfaults = [{faults}]\n"
        );
        std::fs::write(&file, text).expect("written");
        file.to_str().expect("UTF-8").to_owned()
    };
    clean(&[&with("\"error@1\", \"error@2\"")]);
    for (faults, is_lost) in [
        ("\"error@5\", \"error@6\", \"error@7\", \"error@8\"", true),
        ("\"corrupt@1\", \"corrupt@2\"", false),
    ] {
        let result = run(1, &[&with(faults)]);
        let violations = result["violations"].as_array().expect("a list");
        assert!(!violations.is_empty(), "{result}");
        for violation in violations {
            let text = violation.to_string();
            assert!(text.contains("what was read from the disk"), "{text}");
            let found = violation["found"].as_str().expect("what was found");
            assert_eq!(found == "0x0000000000000000", is_lost, "{text}");
        }
    }
}

/// Above a limit a child is killed, or its memory goes to the swap area.
#[test]
fn groups_are_clean() {
    for mode in MODES {
        clean(&["groups", "--interrupts", mode]);
    }
    clean(&["groups", "--param", "swap_slots=1024"]);
    let result = run(1, &["groups", "--bug", "uncharge-current-group"]);
    let violations = result["violations"].as_array().expect("a list");
    assert!(violations.iter().any(|violation| violation["id"] == "G-01"));
}

#[test]
fn stress_is_clean() {
    for mode in MODES {
        clean(&["stress", "--interrupts", mode]);
    }
}
