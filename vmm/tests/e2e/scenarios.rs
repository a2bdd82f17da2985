//! What the scenarios of the repository come to, and which host runs them.

use super::{Host, MODES, clean, doctor, host, run};

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
