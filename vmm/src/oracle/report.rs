//! A difference, told: the program, where the two part, what each of them shows there.

use std::fmt::Write as _;

use super::campaign::Difference;
use super::case::lines;
use super::executor::Outcome;
use super::observation::{Observation, flat, page_lines};

/// Most lines of a program that are shown, and what is shown of a longer one.
const MAX_LINES: usize = 500;
const CONTEXT: usize = 25;

/// The difference as text.
#[must_use]
pub fn difference(found: &Difference) -> String {
    let (step, guest, console) = match &found.outcome {
        Outcome::Differs {
            step,
            words,
            console,
            ..
        } => (*step, Some(words.as_slice()), console.as_str()),
        Outcome::Crashed { reason } => (None, None, reason.as_str()),
        Outcome::Alike | Outcome::Interrupted => (None, None, ""),
    };
    let mut text = String::new();
    let all = lines(&found.steps);
    // A recorded program is long, and nothing of it was left out.
    let before = if all.len() > MAX_LINES {
        CONTEXT
    } else {
        MAX_LINES
    };
    let first = step.unwrap_or(all.len()).saturating_sub(before);
    if first > 0 {
        let _ = writeln!(text, "   ...  ({first} steps before)");
    }
    for (index, (depth, line)) in all.into_iter().enumerate().skip(first) {
        let mark = if step == Some(index) { "->" } else { "  " };
        let _ = writeln!(text, "{mark} {index:>3}  {}{line}", "  ".repeat(depth));
        if step == Some(index) {
            // What comes behind was not executed.
            break;
        }
    }
    match (step, guest) {
        (Some(step), Some(words)) => sides(found, step, words, &mut text),
        _ if matches!(found.outcome, Outcome::Crashed { .. }) => {
            let _ = writeln!(text, "the guest crashed: {console}");
        }
        _ => {
            text += "a process of the guest ended before its case did\n";
            for line in console.lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
    }
    text
}

fn sides(found: &Difference, step: usize, words: &[u64], text: &mut String) {
    let steps = flat(&found.steps);
    let linux = Observation::new(found.expected.shown(step));
    let guest = Observation::new(words);
    let results = [&linux, &guest].map(|side| side.result_text(&steps[step]));
    for (name, result) in ["Linux", "guest"].iter().zip(&results) {
        let _ = writeln!(text, "{name}: {result}");
    }
    let maps = [linux.map_lines(), guest.map_lines()];
    if maps[0] == maps[1] {
        let pages = page_lines([("Linux", &linux), ("guest", &guest)]);
        if !pages.is_empty() {
            *text += "pages that are not the same:\n";
            for line in &pages {
                let _ = writeln!(text, "    {line}");
            }
        } else if results[0] == results[1] {
            *text += "they differ behind what an observation has room for\n";
        }
        *text += "the maps are the same:\n";
        for line in &maps[0] {
            let _ = writeln!(text, "    {line}");
        }
        return;
    }
    for (name, (map, other)) in ["Linux", "guest"]
        .iter()
        .zip([(&maps[0], &maps[1]), (&maps[1], &maps[0])])
    {
        let _ = writeln!(text, "{name}'s map (* where the other has it not):");
        for line in map {
            let mark = if other.contains(line) { ' ' } else { '*' };
            let _ = writeln!(text, "  {mark} {line}");
        }
    }
}
