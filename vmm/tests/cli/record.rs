//! `record`.

use std::io::Write as _;
use std::process::Command;

use super::{refused, stalemate, stderr, stdout};

/// A directory with a `strace` that behaves as told, to put before PATH.
fn fake_path(script: Option<&str>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    if let Some(script) = script {
        let path = directory.path().join("strace");
        let mut file = std::fs::File::create(&path).expect("the script is created");
        file.write_all(script.as_bytes())
            .expect("the script is written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, mode).expect("the script is executable");
    }
    directory
}

#[test]
fn record_without_strace_says_how_to_get_it() {
    let empty = fake_path(None);
    let output = Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(["record", "-o", "x.trace", "--", "/bin/true"])
        .current_dir(empty.path())
        .env("PATH", empty.path())
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(text.contains("strace") && text.contains("apt"), "{text}");
    assert!(!empty.path().join("x.trace").exists());
}

#[test]
fn what_a_recorded_command_prints_stays_out_of_the_json() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("x.trace");
    let trace = trace.to_str().expect("UTF-8");
    let command = ["--", "echo", "from the command"];
    let record = |options: &[&str]| stalemate(&[&["record"], options, &command].concat());
    let output = record(&["--json", "-o", trace]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "this test needs the Debian package `strace`: {}",
        stderr(&output)
    );
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("stdout is JSON only");
    assert_eq!(json["kind"], "record");
    assert!(stderr(&output).contains("from the command\n"));
    let output = record(&["--force", "-o", trace]);
    assert!(stdout(&output).starts_with("from the command\n"));
}

#[test]
fn record_does_not_overwrite_without_force() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("x.trace");
    std::fs::write(&trace, "precious").expect("the file is written");
    let trace_name = trace.to_str().expect("UTF-8");
    refused(
        &["record", "-o", trace_name, "--", "true"],
        &["x.trace", "--force"],
    );
    assert_eq!(
        std::fs::read_to_string(&trace).expect("still there"),
        "precious"
    );
}
