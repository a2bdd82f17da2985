//! What is refused of scenarios and values, and in which words.

use super::{refused, scenario, stalemate, stderr};

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

/// Reproducers are named after it: it must not lead out of `--out`, nor say anything to a terminal or a shell.
#[test]
fn a_scenario_with_another_name_than_a_word_is_refused() {
    for name in [
        "../escaped",
        "/tmp/x/abs",
        "a b",
        "$(id)",
        "a\\nb",
        "\\u001b[31mred",
    ] {
        let (_dir, path) = scenario(&format!(
            "\nname = \"{name}\"\n[program]\nname = \"smoke\"\n"
        ));
        refused(
            &["explore", &path],
            &["bad.toml:2:8: a scenario cannot have the name", "letters"],
        );
    }
    let (directory, path) = scenario("[program]\nname = \"smoke\"\n");
    let blank = directory.path().join("a b.toml");
    std::fs::rename(path, &blank).expect("renamed");
    let blank = blank.to_str().expect("UTF-8");
    refused(
        &["explore", blank],
        &["a b.toml:1:1: a scenario cannot have the name", "name = "],
    );
    refused(
        &["explore", "\x1b[31mred\n"],
        &["no scenario '\\u{1b}[31mred\\n'"],
    );
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
fn a_snapshot_that_is_none_is_told_from_a_scenario() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes, why) in [
        ("empty", &b""[..], "0 bytes are too few for a snapshot or a"),
        ("three", b"STA", "3 bytes are too few for a snapshot or a"),
        ("cut", b"STALESNP\x01\0\0\0\0\0\0\0", "is cut off: 16 bytes"),
        ("text.snapshot", b"this is no snapshot", "is no snapshot"),
    ] {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).expect("the file is written");
        let path = path.to_str().expect("UTF-8");
        refused(
            &["explore", path],
            &[path, why, "`stalemate snapshot` takes a new one"],
        );
        let text = stderr(&stalemate(&["explore", path]));
        assert!(
            !text.contains("TOML") && !text.contains("scenarios.md"),
            "{text}"
        );
    }
    // Only explore goes on from one.
    let cut = directory.path().join("cut");
    let cut = cut.to_str().expect("UTF-8");
    let out = directory.path().join("new.snapshot");
    let out = out.to_str().expect("UTF-8");
    for words in [
        &["run", cut][..],
        &["inspect", cut, "--at", "idle"],
        &["snapshot", cut, "-o", out],
    ] {
        refused(words, &["is a machine, saved", "stalemate explore"]);
    }
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
