//! End to end: scenarios on a real host, from the command line to the verdict.
//!
//! `STALEMATE_E2E_HOST=kvm` (the default) runs the built binary on this host's /dev/kvm; `lab` runs
//! `scripts/lab -- …` with the statically linked binary that `STALEMATE_LAB_BINARY` names. A host
//! that cannot run machines fails every test here with the name of what is missing: a test that
//! quietly does nothing is a lie.

mod bench;
mod explore;
mod inspect;
mod parallel;
mod results;
mod scenarios;

use std::path::Path;
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
