//! Direct I/O end to end: the scenario `direct` on this host's /dev/kvm (`run`, `explore --engine kvm`) and on the model,
//! with a disk that works, one whose third request fails, and one that spoils what it reads.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// Where a run says what it found.
const EXPLORE: [&str; 2] = ["model", "kvm"];

/// `scenarios/direct.toml` with one page, and these faults of its disk.
struct Scenario {
    directory: tempfile::TempDir,
    file: PathBuf,
}

impl Scenario {
    fn new(interrupts: &str, faults: &str) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = Path::new(REPOSITORY).join("scenarios/direct.toml");
        let text = std::fs::read_to_string(path).expect("the scenario");
        let changed = text
            .replace(
                "name = \"direct\"\n\n[kernel]",
                "name = \"direct\"\nargs = { pages = 1, rounds = 1 }\n\n[kernel]",
            )
            .replace(
                "interrupts = \"controlled\"",
                &format!("interrupts = \"{interrupts}\""),
            );
        assert!(changed.contains("pages = 1"), "{changed}");
        let file = directory.path().join("direct.toml");
        std::fs::write(&file, format!("{changed}\n[disk]\nfaults = [{faults}]\n"))
            .expect("written");
        Self { directory, file }
    }

    /// The exit code, and all that is printed.
    fn ask(&self, words: &[&str]) -> (i32, String) {
        assert!(
            Path::new("/dev/kvm").exists(),
            "this test boots a guest, and there is no /dev/kvm"
        );
        let (name, rest) = words.split_first().expect("a command");
        let Output {
            status,
            stdout,
            stderr,
        } = Command::new(env!("CARGO_BIN_EXE_stalemate"))
            .arg(name)
            .arg(&self.file)
            .args(rest)
            .arg("--out")
            .arg(self.directory.path().join("out"))
            .current_dir(REPOSITORY)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .output()
            .expect("the binary runs");
        let text = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (status.code().expect("an exit code"), text.concat())
    }

    /// What exploring a few schedules on `engine` gives.
    fn explore(&self, engine: &str) -> (i32, String) {
        let schedules = if engine == "kvm" { "4" } else { "200" };
        self.ask(&[
            "explore",
            "--engine",
            engine,
            "--seed",
            "1",
            "--schedules",
            schedules,
        ])
    }
}

#[track_caller]
fn says((code, text): &(i32, String), expected: i32, part: &str) {
    assert_eq!(*code, expected, "{text}");
    assert!(text.contains(part), "no '{part}' in:\n{text}");
}

#[test]
fn a_disk_that_works_is_read_as_it_was_written() {
    let scenario = Scenario::new("controlled", "");
    for engine in EXPLORE {
        says(&scenario.explore(engine), 0, "nothing wrong was seen");
    }
    for interrupts in ["controlled", "hardware"] {
        let scenario = Scenario::new(interrupts, "");
        says(
            &scenario.ask(&["run", "--param", "tlb=hw"]),
            0,
            "all invariants held",
        );
    }
}

#[test]
fn a_request_that_fails_is_told_as_eio() {
    let scenario = Scenario::new("controlled", "\"error@2\"");
    for engine in EXPLORE {
        let told = scenario.explore(engine);
        says(&told, 1, "a system call returned a wrong result");
        says(&told, 1, "EIO");
    }
    says(
        &scenario.ask(&["run"]),
        1,
        "a system call returned a wrong result",
    );
}

#[test]
fn data_that_the_disk_spoils_are_told_from_those_that_were_written() {
    let scenario = Scenario::new("controlled", "\"corrupt@2\"");
    let part = "what was read from the disk is not what was written to it";
    for engine in EXPLORE {
        says(&scenario.explore(engine), 1, part);
    }
    says(&scenario.ask(&["run"]), 1, part);
}

/// What fails is replayed with its disk, on the other engine too.
#[test]
fn a_reproducer_keeps_the_faults_of_its_disk() {
    let scenario = Scenario::new("controlled", "\"corrupt@2\"");
    let (code, text) = scenario.explore("model");
    assert_eq!(code, 1, "{text}");
    let out = scenario.directory.path().join("out");
    let reproducers: Vec<_> = std::fs::read_dir(out)
        .expect("written")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "repro"))
        .collect();
    let text = std::fs::read_to_string(&reproducers[0]).expect("text");
    assert!(text.contains("corrupt@2") && text.contains(" d0"), "{text}");
    let replayed = Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(["replay", "--engine", "both", "--expect", "--brief"])
        .arg(&reproducers[0])
        .current_dir(REPOSITORY)
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs");
    let told = String::from_utf8_lossy(&replayed.stdout);
    assert_eq!(replayed.status.code(), Some(0), "{told}");
    assert!(told.contains("same ending"), "{told}");
}
