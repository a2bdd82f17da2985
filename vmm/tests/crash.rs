//! What a run shows when the guest fails, on this host's /dev/kvm: exit code 4, and a report that says
//! where and why.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A run of `scenarios/crash.toml` that fails as `how` says.
struct Failed {
    /// What a person sees.
    text: String,
    /// `crash` of the JSON result.
    crash: Value,
}

impl Failed {
    fn run(how: &str) -> Self {
        assert!(
            Path::new("/dev/kvm").exists(),
            "this test boots a guest, and there is no /dev/kvm"
        );
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let text = std::fs::read_to_string(Path::new(REPOSITORY).join("scenarios/crash.toml"))
            .expect("the scenario");
        let (asked, quick) = (format!("how = \"{how}\""), "watchdog = \"1500ms\"");
        let text = text.replace(
            "args = { how = \"panic\" }",
            &format!("args = {{ {asked} }}"),
        );
        let text = text.replace("watchdog = \"5s\"", quick);
        assert!(text.contains(&asked) && text.contains(quick), "{text}");
        let scenario = directory.path().join("crash.toml");
        std::fs::write(&scenario, text).expect("written");

        let out = directory.path().join("out");
        let output = stalemate(&[
            "run".as_ref(),
            scenario.as_ref(),
            "--out".as_ref(),
            out.as_ref(),
        ]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{text}\n{errors}");
        let json = std::fs::read(out.join("result.json")).expect("a result");
        let result: Value = serde_json::from_slice(&json).expect("JSON");
        assert_eq!(result["exit_code"], 4);
        assert_eq!(result["verdict"], "crashed");
        Self {
            text,
            crash: result["crash"].clone(),
        }
    }

    /// The vCPU that the report puts first: any of them may have taken the first task.
    fn vcpu(&self) -> &Value {
        &self.crash["vcpus"][0]
    }

    /// Names of its functions from the site of the crash outwards.
    fn functions(&self) -> Vec<&str> {
        let site = self.vcpu()["site"].as_u64().expect("a site") as usize;
        let frames = self.vcpu()["backtrace"].as_array().expect("a backtrace");
        frames[site..]
            .iter()
            .flat_map(|frame| frame["functions"].as_array().expect("functions"))
            .map(|function| function["function"].as_str().expect("a name"))
            .collect()
    }

    /// The parts of the text in their order.
    #[track_caller]
    fn shows(&self, parts: &[&str]) {
        let mut rest = self.text.as_str();
        for part in parts {
            let at = rest
                .find(part)
                .unwrap_or_else(|| panic!("{part:?} is missing or out of order in\n{}", self.text));
            rest = &rest[at + part.len()..];
        }
    }

    /// What holds of every crash that a task's system call led to.
    #[track_caller]
    fn names_the_call(&self, how: u64) {
        let functions = self.functions();
        for name in ["testbed_crash", "syscall", "trap", "user_main"] {
            assert!(
                functions.iter().any(|function| function.ends_with(name)),
                "no {name} in {functions:?}"
            );
        }
        self.shows(&[
            "task 1    in ",
            &format!("in system call testbed_crash({how:#x}, "),
            "backtrace:",
            "registers",
            "code:",
            &format!("task 1  syscall-enter testbed_crash a0={how:#x}"),
        ]);
        let vcpus = self.crash["vcpus"].as_array().expect("vCPUs");
        assert_eq!(vcpus.len(), 2);
        for vcpu in vcpus {
            assert!(vcpu["regs"]["rip"].as_str().is_some_and(|rip| rip != "0x0"));
            assert!(!vcpu["code"].as_array().expect("code").is_empty());
        }
        let events = self.vcpu()["events"].as_array().expect("events");
        assert_eq!(
            events.last().map(|last| &last["before_ns"]),
            Some(&Value::from(0))
        );
    }
}

fn stalemate(words: &[&std::ffi::OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(words)
        .current_dir(REPOSITORY)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

#[test]
fn a_panic_names_who_called_for_it() {
    let failed = Failed::run("panic");
    assert_eq!(failed.crash["cause"], "kernel-panic");
    assert_eq!(failed.crash["vcpu"], failed.vcpu()["index"]);
    failed.shows(&[
        "GUEST FAILED kernel panic: task 1 asked for a panic",
        "in testbed::testbed_crash  guest-kernel/src/task/testbed.rs:",
        "the panic itself, ",
    ]);
    assert!(failed.functions()[0].ends_with("testbed_crash"));
    assert_eq!(failed.vcpu()["cr2_walk"], Value::Null);
    failed.names_the_call(0);
}

#[test]
fn a_wild_load_is_shown_where_it_happened_not_where_the_kernel_ended() {
    let failed = Failed::run("wild");
    assert_eq!(failed.crash["cause"], "kernel-panic");
    failed.shows(&[
        "in testbed::wild_load  guest-kernel/src/task/testbed.rs:",
        "#PF at CPL 0: read of 0xffffdead00000000, not present (error 0x0)",
        "CR2: GVA 0xffffdead00000000",
        "not present at level 4",
        "registers where the kernel faulted:",
    ]);
    let vcpu = failed.vcpu();
    let site = &vcpu["backtrace"][vcpu["site"].as_u64().expect("a site") as usize];
    assert_eq!(site["entry"]["vector"], 14);
    assert_eq!(site["entry"]["cpl"], 0);
    assert_eq!(site["entry"]["regs"]["rip"], site["address"]);
    let load = &vcpu["code"][0];
    assert_eq!(load["address"], site["address"]);
    assert!(
        load["text"]
            .as_str()
            .is_some_and(|text| text.starts_with("mov (")),
        "{load}"
    );
    assert_eq!(vcpu["cr2_walk"]["gva"], "0xffffdead00000000");
    failed.names_the_call(1);
}

#[test]
fn a_hang_of_the_kernel_is_found_by_the_watchdog() {
    let failed = Failed::run("hang");
    assert_eq!(failed.crash["cause"], "no-progress");
    assert_eq!(failed.crash["vcpu"], Value::Null);
    failed.shows(&[
        "GUEST FAILED no progress for 1.5 s",
        "in testbed::hang  guest-kernel/src/task/testbed.rs:",
        "halted    in registers::wait_for_interrupt",
    ]);
    failed.names_the_call(2);
}

#[test]
fn a_program_that_spins_for_ever_is_found_too() {
    let failed = Failed::run("user-spin");
    assert_eq!(failed.crash["cause"], "no-progress");
    failed.shows(&[
        "task 1    in crash::spin  guest/src/programs/crash.rs:",
        "halted    in ",
        ": CPL 3",
        "user_main",
        "_start",
    ]);
    assert_eq!(failed.vcpu()["task"], 1);
}

#[test]
fn the_report_fits_a_terminal() {
    let failed = Failed::run("panic");
    let body = failed.text.lines().skip(3);
    for line in body.take_while(|line| !line.starts_with("  time: ")) {
        // Names and paths are the guest's; of this crash, these are too long.
        let long = line.contains("wait_for_interrupt (inlined)");
        assert!(long || line.chars().count() <= 100, "{line}");
    }
}
