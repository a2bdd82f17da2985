//! `inspect`.

use serde_json::Value;

use super::{doctor, stalemate, text};

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
