//! A kernel without the feature `testbed` has nothing of the testbed in its fault path.

use std::path::Path;

use stalemate_benches::code::{FaultPath, Trace};
use stalemate_benches::kernels::Build;

fn path(build: Build) -> FaultPath {
    let elf = build.elf(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let elf = elf.unwrap_or_else(|error| panic!("{error}"));
    FaultPath::of(&elf).unwrap_or_else(|error| panic!("{error}"))
}

/// What is looked for is found where it is.
#[test]
fn the_fault_path_of_the_embedded_kernel_is_full_of_the_testbed() {
    let traces = path(Build::Testbed).traces();
    let found = |of: fn(&Trace) -> bool| traces.iter().any(of);
    assert!(found(|trace| matches!(trace, Trace::Function(_))));
    assert!(found(|trace| matches!(trace, Trace::Channel(_))));
    assert!(found(|trace| matches!(trace, Trace::Ticket(_))));
    assert!(found(|trace| matches!(trace, Trace::Stamp(_))));
    assert!(found(|trace| matches!(trace, Trace::Port(_))));
}

#[test]
fn the_fault_path_of_a_bare_kernel_has_no_trace_of_it() {
    let bare = path(Build::Bare);
    let traces = bare.traces();
    assert!(traces.is_empty(), "{traces:#?}");
    let names: Vec<_> = bare.functions().map(|f| f.name.as_str()).collect();
    for part in [
        "handle_fault",
        "first_touch",
        "alloc_user_frame",
        "flush_here",
        "set_used_pte",
    ] {
        let reached = names.iter().any(|name| name.ends_with(part));
        assert!(reached, "{part} is part of a fault: {names:#?}");
    }
}

/// The absence of known traces does not show the absence of all: a load whose value only an event
/// needs looks like any other. But there is nothing that an event could leave behind where the source has none.
#[test]
fn a_bare_kernel_has_the_instructions_of_a_kernel_without_a_call_of_the_testbed() {
    let (bare, absent) = (path(Build::Bare).listing(), path(Build::Absent).listing());
    assert_ne!(bare, path(Build::Testbed).listing(), "what differs is seen");
    let differs = bare.iter().zip(&absent).position(|(a, b)| a != b);
    if let Some(line) = differs {
        let window = line.saturating_sub(5)..line + 5;
        panic!(
            "bare {:#?}\nwithout {:#?}",
            &bare[window.start..window.end.min(bare.len())],
            &absent[window.start..window.end.min(absent.len())]
        );
    }
    assert_eq!(bare.len(), absent.len());
    assert!(bare.len() > 1000, "only {} lines", bare.len());
}
