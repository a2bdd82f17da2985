//! Hosts that lack something.

use std::process::{Command, Output, Stdio};

use super::{REPOSITORY, stderr, stdout};

/// Runs the binary where `/dev` is what the shell words `dev` make of an empty directory.
fn with_dev(dev: &str, words: &[&str]) -> Output {
    let script = format!("mount -t tmpfs tmpfs /dev && {dev} exec \"$@\"");
    let output = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            &script,
            "sh",
        ])
        .arg("setpriv")
        // Root of a user namespace may open what it owns, whatever the mode: not here.
        .args(["--inh-caps=-all", "--bounding-set=-all"])
        .arg(env!("CARGO_BIN_EXE_stalemate"))
        .args(words)
        .current_dir(REPOSITORY)
        .stdin(Stdio::null())
        .output()
        .expect("unshare runs (util-linux)");
    assert!(
        !stderr(&output).contains("unshare:"),
        "this test needs user and mount namespaces: {}",
        stderr(&output)
    );
    output
}

#[test]
fn a_host_without_kvm_is_told_the_lab_command() {
    let output = with_dev("", &["run", "smoke", "--vcpus", "4"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    for word in ["no /dev/kvm", "scripts/lab -- run smoke --vcpus 4"] {
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    let doctor = with_dev("", &["doctor"]);
    assert_eq!(doctor.status.code(), Some(3), "{}", stdout(&doctor));
    assert!(stdout(&doctor).contains("scripts/lab --"));
}

#[test]
fn a_user_who_may_not_open_kvm_is_told_the_group() {
    let closed = ": > /dev/kvm && chmod 0 /dev/kvm &&";
    let output = with_dev(closed, &["run", "smoke"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    for word in ["no permission", "group kvm", "scripts/lab -- run smoke"] {
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn a_device_that_is_not_kvm_is_no_host() {
    let output = with_dev(": > /dev/kvm &&", &["run", "smoke"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
}
