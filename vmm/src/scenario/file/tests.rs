//! Which scenarios are refused, and at which place.

use super::*;
use miette::Diagnostic as _;

fn refusal(text: &str) -> (String, String) {
    let error = parse(Path::new("bad.toml"), text).unwrap_err();
    let help = error
        .help()
        .map(|help| help.to_string())
        .unwrap_or_default();
    (error.to_string(), help)
}

#[test]
fn each_refusal_has_a_place_and_says_what_was_expected() {
    let cases = [
        (
            "[program]\nname = 'smoke'\n[machine]\nvcpus = 0",
            "bad.toml:4:9: 0 vCPUs",
            "",
        ),
        (
            "[program]\nname = 'smoke'\n[machine]\nvcpus = 1000",
            "bad.toml:4:9: 1000 vCPUs: a machine has 1 to 16",
            "",
        ),
        (
            "[program]\nname = 'smoke'\n[machine]\nvcpus = 'two'",
            "bad.toml:4:9: invalid type",
            "",
        ),
        (
            "[program]\nname = 'smoke'\n[machine]\nmemory = '1M'",
            "bad.toml:4:10: 1M of memory is too small: the minimum is 16M",
            "",
        ),
        (
            "[program]\nname = 'smoke'\n[machine]\ninterrupts = 'hard'",
            "bad.toml:4:14: unknown variant 'hard'",
            "hardware",
        ),
        (
            "[program]\nname = 'smok'",
            "bad.toml:2:8: no program 'smok'",
            "'smoke'",
        ),
        (
            "[program]\nnam = 'smoke'",
            "bad.toml:2:1: unknown field 'nam'",
            "'name'",
        ),
        (
            "[progam]\nname = 'smoke'",
            "bad.toml:1:2: unknown field 'progam'",
            "'program'",
        ),
        (
            "name = 'x'",
            "bad.toml:1:1: missing field 'program'",
            "docs/scenarios.md",
        ),
        ("name = ", "bad.toml:1:8:", "docs/scenarios.md"),
        (
            "[program]\nname = 'smoke'\n[kernel]\nparams = { poisn = 'on' }",
            "bad.toml:4:12: no kernel parameter 'poisn'",
            "'poison'",
        ),
        (
            "[program]\nname = 'smoke'\n[kernel]\nparams = { poison = 3 }",
            "bad.toml:4:21: '3' is no value",
            "poison=on|off",
        ),
        (
            "[program]\nname = 'smoke'\n[kernel]\nbugs = ['free-before-flus']",
            "bad.toml:4:9: no seeded bug",
            "'free-before-flush'",
        ),
        (
            "[program]\nname = 'smoke'\n[limits]\ntimeout = '5'",
            "bad.toml:4:11: '5' has no unit",
            "30s",
        ),
        (
            "[program]\nname = 'smoke'\n[parallel]\ndelay = ['flush-synk=1us']",
            "bad.toml:4:10: no scheduling point 'flush-synk'",
            "'flush-sync'",
        ),
        (
            "[program]\nname = 'smoke'\n[parallel]\nipi = ['any=lose']",
            "bad.toml:4:8: 'lose' is no fault",
            "dup",
        ),
        (
            "[program]\nname = 'smoke'\n[check]\nwhen = 'never'",
            "bad.toml:4:8: unknown variant 'never'",
            "end",
        ),
        (
            "[program]\nname = 'replay'",
            "bad.toml:2:8: program 'replay' needs a trace",
            "stalemate record",
        ),
        (
            "[program]\nname = 'replay'\ntrace = { file = 'absent.trace' }",
            "bad.toml:3:18: cannot read the trace",
            "relative",
        ),
        (
            "[program]\nname = 'smoke'\ntrace = { file = 'x' }",
            "bad.toml:3:18: program 'smoke' replays no trace",
            "'replay'",
        ),
    ];
    for (text, problem, help) in cases {
        let refused = refusal(text);
        assert!(refused.0.starts_with(problem), "{text}\n -> {refused:?}");
        assert!(refused.1.contains(help), "{text}\n -> {refused:?}");
    }
}

#[test]
fn a_scenario_in_a_string_is_refused_where_it_stands_in_the_file() {
    let text = "[program]\nname = 'smok'\n";
    let refusal = |written: &str| {
        let whole = format!("a = 1\nµ = {written}\nb = 2\n");
        let start = whole.find(written).unwrap();
        let at = start..start + written.len();
        let error = parse_within(Path::new("x.repro"), &whole, at, text).unwrap_err();
        error.to_string()
    };
    let found = refusal(&format!("\"\"\"\n{text}\"\"\""));
    assert!(
        found.starts_with("x.repro:4:8: no program 'smok'"),
        "{found}"
    );
    // With escapes, the string is all that can be pointed at.
    let found = refusal("\"[program]\\nname = 'smok'\\n\"");
    assert!(
        found.starts_with("x.repro:2:5: no program 'smok'"),
        "{found}"
    );
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "(\\[program\\]\nname=\"smoke\"\n)?\\PC{0,80}") {
        let _ = parse(Path::new("bad.toml"), &text);
    }
}
