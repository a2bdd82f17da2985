//! What verdicts say.

use super::super::tests::result;
use super::*;

#[test]
fn a_clean_run_says_so_first_and_what_it_could_not_decide() {
    let text = render(&result(Verdict::Held), Paint::Plain, Detail::Normal);
    assert!(
        text.starts_with("✔ all invariants held (1 invariants examined, 1 not decided)\n"),
        "{text}"
    );
    assert!(
        text.contains("N-01: this host has no nested page tables"),
        "{text}"
    );
    assert!(text.contains("repeat: stalemate run smoke"), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
}

#[test]
fn a_violation_leads_with_its_id_and_shows_what_was_expected() {
    let mut result = result(Verdict::Violation);
    result.violations = vec![
        Violation {
            id: "P-02".into(),
            title: "a free frame is mapped".into(),
            expected: Some("no mapping".into()),
            found: Some("mm 1 at 0x1000".into()),
            at: "the end of the run".into(),
            details: vec!["level 1: …".into()],
        };
        2
    ];
    (result.runs, result.runs_done) = (20, 7);
    let text = render(&result, Paint::Plain, Detail::Normal);
    assert!(
        text.starts_with("✘ VIOLATION P-02 in run 7 of 20 a free frame is mapped (and 1 more)\n"),
        "{text}"
    );
    assert!(
        text.contains("expected no mapping") && text.contains("found    mm 1 at 0x1000"),
        "{text}"
    );
}

#[test]
fn the_other_verdicts_have_their_own_line() {
    let mut crashed = result(Verdict::Crashed);
    crashed.crash = Some(serde_json::json!({ "reason": "triple fault on vCPU 1" }));
    assert_eq!(
        headline(&crashed, Paint::Plain),
        "✘ GUEST FAILED triple fault on vCPU 1"
    );
    assert!(headline(&result(Verdict::Interrupted), Paint::Plain).contains("INTERRUPTED"));
    assert!(headline(&result(Verdict::BadInput), Paint::Plain).contains("'smoke' refused"));
    let mut starved = result(Verdict::BadInput);
    starved.crash = Some(serde_json::json!({ "reason": "the guest ran out of memory" }));
    assert_eq!(
        headline(&starved, Paint::Plain),
        "✘ BAD INPUT the guest ran out of memory"
    );
    assert!(headline(&result(Verdict::Held), Paint::Colour).contains("\x1b[1;32m✔"));
    let mut many = result(Verdict::Held);
    (many.runs, many.runs_done) = (20, 20);
    assert!(headline(&many, Paint::Plain).contains("held in 20 runs"));
}

#[test]
fn what_was_disturbed_and_what_was_judged_is_said() {
    let mut result = result(Verdict::Held);
    result.disturbances = vec![crate::control::Disturbance {
        rule: "flush-sync=50us".into(),
        passages: 4,
        hits: 2,
        held_ns: 120_000,
        longest_ns: 70_000,
        timeouts: 1,
    }];
    result.stream = Some(crate::report::StreamFacts {
        events: 1234,
        undecided: [("T-09", 3)].into(),
        given_up: vec![("T-01", 77), ("F-01", u64::MAX)],
        unjudged: 5,
        broken: Some("vCPU 1 has lost events".into()),
    });
    let text = render(&result, Paint::Plain, Detail::Normal);
    for words in [
        "disturbed: flush-sync=50us: 2 of 4 passages, held 120 us, 70.0 us at most, 1 in vain",
        "? no violation is certain, but some are possible",
        "streams: 1234 events judged, 3 T-09 undecided",
        "5 not judged",
        "too many orders to try for T-01 at event 77",
        "too many orders to try for F-01 at the end of the run",
        "vCPU 1 has lost events",
    ] {
        assert!(text.contains(words), "no '{words}' in {text}");
    }
}

#[test]
fn times_keep_three_digits() {
    for (ns, text) in [
        (7, "7 ns"),
        (1_500, "1.50 us"),
        (16_000, "16.0 us"),
        (213_400_000, "213 ms"),
        (4_000_000_000, "4.00 s"),
    ] {
        assert_eq!(format_time(Duration::from_nanos(ns)), text);
    }
}

#[test]
fn a_command_can_be_pasted_back() {
    let words = ["run", "my scenario.toml", "--param", "a=1", "it's", ""].map(String::from);
    assert_eq!(
        shell_words(&words),
        r"run 'my scenario.toml' --param a=1 'it'\''s' ''"
    );
}
