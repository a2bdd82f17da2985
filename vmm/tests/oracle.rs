//! `stalemate oracle` from outside.

mod common;

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use common::stalemate;

fn text_of(output: &Output) -> String {
    format!(
        "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[track_caller]
fn json(exit: i32, words: &[&str]) -> Value {
    let output = stalemate(&[words, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(exit), "{}", text_of(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn the_model_agrees_with_linux_and_a_seed_gives_the_same_cases() {
    let words = ["oracle", "--cases", "200", "--ops", "50", "--seed", "1"];
    let first = json(0, &words);
    assert_eq!(first["summary"]["cases"], 200);
    assert_eq!(first["summary"]["steps"], 10_000);
    assert_eq!(first["difference"], Value::Null);
    let again = json(0, &[&words[..], &["--jobs", "2"]].concat());
    assert_eq!(first["summary"], again["summary"]);
}

#[test]
fn the_kernel_on_vcpus_agrees_with_linux() {
    if !Path::new("/dev/kvm").exists() {
        return eprintln!("skipped: this host has no /dev/kvm");
    }
    let words = ["oracle", "--engine", "kvm", "--cases", "20", "--seed", "2"];
    let result = json(0, &words);
    assert_eq!(result["summary"]["cases"], 20);
    assert_eq!(result["engine"], "kvm");
}
