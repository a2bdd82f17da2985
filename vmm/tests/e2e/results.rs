//! Runs that come to no end, and where results go.

use std::path::PathBuf;

use serde_json::Value;

use super::{doctor, run, stalemate, text};

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
