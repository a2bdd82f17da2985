//! What the tests of the command line share.

use std::process::{Command, Output, Stdio};

pub(crate) const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Runs `command` with `words` at the root of the repository; no terminal, no colours.
pub(crate) fn ran(command: &mut Command, words: &[&str]) -> Output {
    command
        .args(words)
        .current_dir(REPOSITORY)
        .env_remove("STALEMATE_HOST_KIND")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

/// The binary.
pub(crate) fn stalemate(words: &[&str]) -> Output {
    ran(&mut Command::new(env!("CARGO_BIN_EXE_stalemate")), words)
}
