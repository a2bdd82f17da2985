//! The command line from outside: what it refuses, with which code and in which words, and what it
//! lists. Nothing here boots a machine.

#[path = "../common/mod.rs"]
mod common;
mod explore;
mod host;
mod input;
mod options;
mod output;
mod record;

use std::process::Output;

use common::{REPOSITORY, stalemate};

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("stdout is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("stderr is UTF-8")
}

/// Asserts that `words` are refused as bad input and that stderr has each of `essential`.
#[track_caller]
fn refused(words: &[&str], essential: &[&str]) {
    let output = stalemate(words);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{words:?}\n{text}");
    for word in essential {
        assert!(
            text.contains(word),
            "{words:?} does not say '{word}':\n{text}"
        );
    }
    assert!(!text.contains('\x1b'), "{words:?} colours a pipe:\n{text}");
    assert_eq!(stdout(&output), "", "{words:?}");
}

/// A scenario file with this text, in a directory that lives as long as the value.
fn scenario(text: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("bad.toml");
    std::fs::write(&path, text).expect("the file is written");
    let path = path.to_str().expect("UTF-8").to_owned();
    (directory, path)
}
