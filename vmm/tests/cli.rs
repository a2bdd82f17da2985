//! The command line from outside: what it refuses, with which code and in which words, and what it
//! lists. Nothing here boots a machine.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Runs the binary at the root of the repository; no terminal, no colours.
fn stalemate(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(words)
        .current_dir(REPOSITORY)
        .env_remove("STALEMATE_HOST_KIND")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs")
}

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

#[test]
fn a_missing_scenario_is_refused_with_the_nearest_name() {
    refused(&["run", "smoek"], &["no scenario 'smoek'", "'smoke'"]);
    refused(
        &["run", "absent/dir/x.toml"],
        &["no scenario 'absent/dir/x.toml'"],
    );
    refused(&["run"], &["SCENARIO"]);
    refused(&["run", "--json"], &["<SCENARIO> is missing"]);
}

#[test]
fn a_malformed_scenario_is_refused_at_its_line_and_column() {
    let (_dir, path) = scenario("name = \"x\"\n[program\nname = \"smoke\"\n");
    refused(&["run", &path], &["bad.toml:2:9", "[program"]);
    let (_dir, path) = scenario("[program]\nname = \"smoke\"\n[machine]\nvcpus = \"many\"\n");
    refused(
        &["run", &path],
        &["bad.toml:4:9", "vcpus = \"many\"", "invalid type"],
    );
    let (_dir, path) = scenario("[program]\nname = \"smoke\"\n[machin]\nvcpus = 2\n");
    refused(
        &["run", &path],
        &[
            "bad.toml:3:2",
            "unknown field 'machin'",
            "did you mean 'machine'",
        ],
    );
    let (_dir, path) = scenario("");
    refused(&["run", &path], &["missing field 'program'"]);
}

#[test]
fn a_scenario_that_is_not_text_is_refused() {
    let (directory, _) = scenario("");
    let path = directory.path().join("binary.toml");
    std::fs::write(&path, [0xff, 0xfe, 0x00]).expect("the file is written");
    refused(
        &["run", path.to_str().expect("UTF-8")],
        &["cannot read", "binary.toml", "line 1, column 1: byte 0xff"],
    );
    for path in ["scenarios", "/dev/zero"] {
        refused(&["run", path], &["cannot read", path, "not a regular file"]);
    }
    let (_dir, path) =
        scenario("[program]\nname = \"replay\"\n[program.trace]\nfile = \"/dev/zero\"\n");
    refused(&["run", &path], &["bad.toml:4:8", "not a regular file"]);
}

#[test]
fn an_unknown_program_is_refused_with_the_nearest_name() {
    let (_dir, path) = scenario("[program]\nname = \"unmaprace\"\n");
    refused(
        &["run", &path],
        &["bad.toml:2:8", "no program 'unmaprace'", "'unmap-race'"],
    );
    let (_dir, path) = scenario("[program]\nname = \"smoke\"\nargs = { nonsense = 1 }\n");
    refused(
        &["run", &path],
        &[
            "bad.toml:3:10",
            "program 'smoke' has no argument 'nonsense'",
        ],
    );
}

#[test]
fn zero_and_a_thousand_vcpus_are_refused() {
    for count in ["0", "17", "1000", "-1"] {
        refused(
            &["run", "smoke", "--vcpus", count],
            &["--vcpus", count, "1 to 16"],
        );
        let (_dir, path) = scenario(&format!(
            "[program]\nname = \"smoke\"\n[machine]\nvcpus = {count}\n"
        ));
        refused(&["run", &path], &["bad.toml:4:9", count, "1 to 16"]);
    }
}

#[test]
fn too_little_memory_is_refused_with_the_minimum() {
    refused(
        &["run", "smoke", "--memory", "1M"],
        &["too small", "the minimum is 16M"],
    );
    refused(
        &["run", "smoke", "--memory", "lots"],
        &["'lots' is not a size", "64M"],
    );
    let (_dir, path) = scenario("[program]\nname = \"smoke\"\n[machine]\nmemory = \"8M\"\n");
    refused(
        &["run", &path],
        &["bad.toml:4:10", "8M", "the minimum is 16M"],
    );
}

#[test]
fn a_kernel_that_is_no_elf_is_refused() {
    refused(
        &["run", "smoke", "--kernel", "Cargo.toml"],
        &["Cargo.toml", "ELF"],
    );
    refused(&["run", "smoke", "--kernel", "absent.elf"], &["absent.elf"]);
    refused(
        &["run", "smoke", "--kernel", "/dev/zero"],
        &["/dev/zero", "not a regular file"],
    );
}

#[test]
fn a_trace_with_an_unknown_call_is_refused_at_its_line() {
    let (directory, path) =
        scenario("[program]\nname = \"replay\"\n[program.trace]\nfile = \"bad.trace\"\n");
    let text = "stalemate-trace 1\ncommand \"true\"\n0 mmapp(0x0, 4096) = 0x1000\n";
    std::fs::write(directory.path().join("bad.trace"), text).expect("the file is written");
    refused(
        &["run", &path],
        &["bad.trace:3:3", "mmapp", "expected a call (mmap,"],
    );
}

#[test]
fn a_line_of_any_length_is_refused_like_a_short_one() {
    let long = "a".repeat(70_000);
    let (_dir, path) = scenario(&format!("[program]\nname = \"smoke\"\n{long} = 1\n"));
    refused(
        &["run", &path],
        &[
            "bad.toml:3:1: unknown field",
            "'aaa",
            "aaa…",
            "one of: name",
        ],
    );
    let (_dir, path) = scenario(&format!("name = \"{long}\" oops\n"));
    refused(&["run", &path], &["bad.toml:1:70011", "…aaa", "oops"]);
    let (directory, path) =
        scenario("[program]\nname = \"replay\"\n[program.trace]\nfile = \"bad.trace\"\n");
    let text = format!("stalemate-trace 1\ncommand \"true\"\n0 {long}(0x0, 4096) = 0x1000\n");
    std::fs::write(directory.path().join("bad.trace"), text).expect("the file is written");
    refused(&["run", &path], &["bad.trace:3:3", "aaa…", "(mmap, munmap"]);
}

#[test]
fn unknown_parameters_bugs_and_points_name_the_nearest() {
    refused(
        &["run", "smoke", "--param", "poisn=on"],
        &["no kernel parameter 'poisn'", "'poison'"],
    );
    refused(&["run", "smoke", "--param", "poison=3"], &["poison=on|off"]);
    refused(&["run", "smoke", "--param", "poison"], &["KEY=VALUE"]);
    refused(
        &["run", "smoke", "--bug", "shootdown-skip"],
        &["no seeded bug 'shootdown-skip'", "'shootdown-skip-remote'"],
    );
    refused(
        &["inspect", "smoke", "--at", "pte-instal"],
        &["'pte-install'"],
    );
    refused(&["inspect", "smoke", "--at", "pte-install:0"], &["from 1"]);
    refused(&["inspect", "smoke"], &["--at", "--after"]);
    refused(
        &[
            "inspect", "smoke", "--at", "idle", "--vcpu", "9", "--vcpus", "2",
        ],
        &["vCPU 9", "0 to 1"],
    );
    refused(&["list", "pionts"], &["points"]);
}

#[test]
fn usage_errors_are_bad_input() {
    refused(&["runn", "smoke"], &["runn", "run"]);
    refused(
        &["replay", "--json", "a.repro", "b.repro"],
        &["would overwrite"],
    );
    refused(&["replay", "no-such.repro"], &["no-such.repro"]);
    refused(
        &["run", "smoke", "--memry", "64M"],
        &["--memry", "--memory"],
    );
    refused(
        &["run", "smoke", "--quiet", "--verbose"],
        &["--quiet", "--verbose"],
    );
    refused(&["run", "smoke", "--runs", "0"], &["--runs"]);
    refused(&["run", "smoke", "--timeout", "5"], &["'5' has no unit"]);
    refused(&["record", "-o", "x.trace"], &["COMMAND"]);
}

#[test]
fn a_result_of_another_program_is_not_overwritten() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(directory.path().join("result.json"), "{}").expect("the file is written");
    let out = directory.path().to_str().expect("UTF-8");
    refused(&["run", "smoke", "--out", out], &["result.json", "--force"]);
    let kept = std::fs::read_to_string(directory.path().join("result.json")).expect("still there");
    assert_eq!(kept, "{}");
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_run() {
    refused(
        &["run", "smoke", "--out", "/dev/null/x"],
        &["cannot write /dev/null/x"],
    );
    refused(
        &["run", "smoke", "--json", "/dev/null/x.json"],
        &["cannot write /dev/null/x.json"],
    );
}

#[test]
fn help_teaches_with_examples_and_exit_codes() {
    let output = stalemate(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for word in [
        "doctor",
        "run",
        "inspect",
        "record",
        "list",
        "Examples:",
        "Exit codes:",
    ] {
        assert!(text.contains(word), "{word}:\n{text}");
    }
    for command in ["doctor", "run", "inspect", "record", "list"] {
        let output = stalemate(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert!(
            stdout(&output).contains(&format!("stalemate {command}")),
            "{}",
            stdout(&output)
        );
        assert!(stdout(&output).contains("--json"), "{}", stdout(&output));
    }
    let version = stdout(&stalemate(&["--version"]));
    assert_eq!(
        version.trim(),
        concat!("stalemate ", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(stalemate(&[]).status.code(), Some(2));
}

#[test]
fn list_shows_every_name_as_text_and_as_json() {
    let expected = [
        (
            "programs",
            vec!["smoke", "unmap-race", "cow-fork", "mprotect-race", "replay"],
        ),
        ("params", vec!["flush_ceiling", "poison", "bug"]),
        (
            "bugs",
            vec![
                "shootdown-skip-remote",
                "fork-no-writeprotect-flush",
                "free-before-flush",
            ],
        ),
        (
            "points",
            vec!["syscall-enter", "pte-install", "flush-sync", "idle"],
        ),
        ("invariants", vec!["P-01"]),
        (
            "scenarios",
            vec![
                "smoke",
                "unmap-race",
                "cow-fork",
                "mprotect-race",
                "trace-python3",
                "trace-rustc",
                "trace-git",
            ],
        ),
    ];
    for (what, names) in expected {
        let text = stalemate(&["list", what]);
        assert_eq!(text.status.code(), Some(0), "{}", stderr(&text));
        let json = stalemate(&["list", what, "--json"]);
        let entries: Vec<serde_json::Value> =
            serde_json::from_slice(&json.stdout).expect("stdout is JSON only");
        assert_eq!(
            stderr(&json),
            stdout(&text),
            "the text goes to stderr beside JSON"
        );
        for name in names {
            assert!(
                stdout(&text).lines().any(|line| line.starts_with(name)),
                "{what}: {name}"
            );
            let entry = entries.iter().find(|entry| entry["name"] == name);
            let help = entry
                .and_then(|entry| entry["help"].as_str())
                .unwrap_or_default();
            assert!(
                help.len() > 10 && !help.starts_with("invalid"),
                "{what} {name}: '{help}'"
            );
        }
        let swallowed = stalemate(&["list", "--json", what]);
        assert_eq!(swallowed.stdout, json.stdout, "list --json {what}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(["list", "points"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_result_that_is_lost_is_an_error() {
    for words in [
        &["list", "params"][..],
        &["list", "params", "--json"],
        &["list", "--help"],
        &["--version"],
    ] {
        let full = std::fs::File::create("/dev/full").expect("/dev/full is there");
        let output = Command::new(env!("CARGO_BIN_EXE_stalemate"))
            .args(words)
            .stdout(full)
            .stderr(Stdio::piped())
            .output()
            .expect("the binary runs");
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}\n{text}");
        assert!(text.contains("cannot write to stdout: No space"), "{text}");
    }
}

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

/// The committed reproducer of a seeded bug, changed, in a file of its own.
fn changed(from: &str, to: &str) -> (tempfile::TempDir, String) {
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../scenarios/reproducers/flush-range-short.repro"
    );
    let text = std::fs::read_to_string(source).expect("it is committed");
    assert!(text.contains(from), "{text}");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("changed.repro");
    std::fs::write(&path, text.replacen(from, to, 1)).expect("written");
    (directory, path.to_str().expect("a name").to_owned())
}

#[test]
fn a_reproducer_that_cannot_be_replayed_says_why() {
    let (_directory, path) = changed("kernel = \"", "kernel = \"00");
    refused(
        &["replay", &path],
        &["was found on kernel 00", "--any-kernel"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"i1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &[
            "changed.repro",
            "i1 is to run, but cannot",
            "in flight",
            "explore",
        ],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"9:1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: ", "step of 9", "2 vCPUs"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"x ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: `x` in its schedule"],
    );
    // No test has so many points.
    let (_directory, path) = changed("schedule = \"", "schedule = \"0:900000000 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro", "cannot be replayed"],
    );
    let (_directory, path) = changed("schedule = \"", "unknown = \"");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: unknown field"],
    );
    refused(&["replay", "/dev/zero"], &["/dev/zero", "no regular file"]);
    let (_directory, path) = changed("test", "tset");
    refused(
        &["replay", "--any-kernel", &path],
        &["its scenario is refused"],
    );
}

#[test]
fn a_failure_that_does_not_come_is_not_reproduced() {
    let (_directory, path) = changed("bugs = [\"flush-range-short\"]", "bugs = []");
    let output = stalemate(&["replay", &path, "--expect", "--brief"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("not reproduced"));
    let output = stalemate(&["replay", &path, "--brief"]);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn explore_writes_a_reproducer_that_replay_confirms() {
    let out = tempfile::tempdir().expect("a directory");
    let directory = out.path().to_str().expect("a name");
    let words = [
        "explore",
        "litmus-unmap",
        "--bug",
        "free-before-flush",
        "--seed",
        "3",
    ];
    let found = stalemate(&[&words[..], &["--out", directory]].concat());
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(1), "{text}");
    assert!(
        text.contains("T-01") && text.contains("vCPU 1") && text.contains("munmap"),
        "{text}"
    );
    let file = std::fs::read_dir(out.path()).expect("listed").next();
    let file = file.expect("a reproducer").expect("readable").path();
    let file = file.to_str().expect("a name");
    let again = stalemate(&["replay", file, "--times", "20", "--expect", "--brief"]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stdout).contains("20 of 20 identical"));
}

#[test]
fn one_seed_gives_one_campaign_whatever_the_jobs() {
    let explore = |jobs: &str| {
        let words = [
            "explore",
            "litmus-switch",
            "--seed",
            "9",
            "--schedules",
            "300",
            "--jobs",
            jobs,
        ];
        let output = stalemate(&[&words[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (
            result["points"].clone(),
            result["events"].clone(),
            result["conflicting_pairs"].clone(),
        )
    };
    assert_eq!(explore("1"), explore("2"));
}

#[test]
fn what_the_model_cannot_contain_is_left_to_vcpus() {
    for scenario in ["crash", "trace-git"] {
        let output = stalemate(&["explore", scenario, "--schedules", "1"]);
        assert_eq!(output.status.code(), Some(2), "{scenario}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("use --engine kvm"));
    }
}

#[test]
fn explore_says_what_it_cannot_do_before_it_starts() {
    refused(
        &["explore", "litmus-unmap", "--kernel", "/bin/ls"],
        &["--kernel /bin/ls", "built in"],
    );
    refused(
        &["explore", "litmus-unmap", "--out", "Cargo.toml"],
        &["--out Cargo.toml", "no directory"],
    );
    refused(&["explore", "litmus-unmap", "--jobs", "1000"], &["1 to 64"]);
    refused(&["explore", "litmus-unmap", "--jobs", "0"], &["1 to 64"]);
}

#[test]
fn three_members_that_wait_for_each_other_get_to_the_start() {
    let words = ["explore", "unmap-race-short", "--vcpus", "4", "--seed", "1"];
    let output = stalemate(&[&words[..], &["--schedules", "20"]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
}

#[test]
fn a_test_that_is_too_long_is_no_livelock() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("long.toml");
    let text = "[machine]\nvcpus = 1\n[program]\nname = \"cow-fork\"\nargs = { rounds = 600 }\n";
    std::fs::write(&file, text).expect("written");
    let path = file.to_str().expect("a name");
    refused(
        &["explore", path, "--schedules", "1", "--seed", "1"],
        &["not over after", "too long"],
    );
}
