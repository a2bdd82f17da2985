//! The values that a person may write, in a scenario file or on the command line, and why one is refused.
//!
//! Both sides use these functions, so a limit is stated once and reads the same everywhere.

use std::time::Duration;

use crate::engine::{PointSet, Window};
use abi::bug::Bug;
use abi::failpoint::Failpoint;
use abi::layout::{MAX_CPUS, MAX_MEMORY, MIN_MEMORY, PAGE_SIZE};
use abi::param::{Config, PARAMS, ParamError};
use abi::point::Point;

/// Why a value is refused, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}{}", help.as_deref().map(|help| format!(" ({help})")).unwrap_or_default())]
pub struct Refused {
    /// What is wrong, with the value.
    pub problem: String,
    /// What would be accepted.
    pub help: Option<String>,
}

impl Refused {
    /// A refusal that says nothing beyond `problem`.
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            help: None,
        }
    }
    /// Adds what to write instead.
    #[must_use]
    pub(crate) fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// The one of `candidates` that `name` was probably meant to be.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (similarity(name, candidate), candidate))
        .filter(|(score, _)| *score > 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn similarity(name: &str, candidate: &str) -> f64 {
    let fold = |text: &str| text.to_ascii_lowercase().replace('_', "-");
    strsim::normalized_damerau_levenshtein(&fold(name), &fold(candidate))
}

/// Characters of a scenario's name.
const NAME: usize = 64;

/// The name of a scenario, if it can be one: files are named after it, and commands are printed with them.
///
/// # Errors
/// It cannot.
pub fn scenario_name(name: &str) -> Result<String, Refused> {
    let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= NAME && name.chars().all(is_known) {
        return Ok(name.to_owned());
    }
    Err(
        Refused::new(format!("a scenario cannot have the name {name:?}")).with_help(format!(
            "write name = \"…\": letters, digits, '-', '_' and '.', at most {NAME}, a letter or digit first; without it the name is the file's"
        )),
    )
}

/// `did you mean …?` where one of `candidates` is near, else the list of all of them.
#[must_use]
pub fn did_you_mean<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str> + Clone,
) -> String {
    match nearest(name, candidates.clone()) {
        Some(candidate) => format!("did you mean '{candidate}'?"),
        None => format!(
            "one of: {}",
            candidates.into_iter().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Number of vCPUs.
///
/// # Errors
/// Outside 1 to [`MAX_CPUS`].
pub fn vcpus(count: i64) -> Result<u32, Refused> {
    u32::try_from(count)
        .ok()
        .filter(|count| (1..=MAX_CPUS as u32).contains(count))
        .ok_or_else(|| Refused::new(format!("{count} vCPUs: a machine has 1 to {MAX_CPUS}")))
}

/// Guest memory in bytes, written as `64M`, `1G`, `65536K` or a number of bytes.
///
/// # Errors
/// Not a size, or outside what the kernel can boot in.
pub fn memory(text: &str) -> Result<u64, Refused> {
    let bytes = size(text)?;
    let limits = || format!("{} to {}", format_size(MIN_MEMORY), format_size(MAX_MEMORY));
    if bytes < MIN_MEMORY {
        return Err(Refused::new(format!(
            "{text} of memory is too small: the minimum is {}",
            format_size(MIN_MEMORY)
        ))
        .with_help(limits()));
    }
    if bytes > MAX_MEMORY {
        return Err(Refused::new(format!(
            "{text} of memory is too large: the maximum is {}",
            format_size(MAX_MEMORY)
        ))
        .with_help(limits()));
    }
    if bytes % PAGE_SIZE != 0 {
        return Err(Refused::new(format!(
            "{text} of memory is not a whole number of 4 KiB pages"
        )));
    }
    Ok(bytes)
}

fn size(text: &str) -> Result<u64, Refused> {
    let trimmed = text
        .strip_suffix("iB")
        .or_else(|| text.strip_suffix('B'))
        .unwrap_or(text);
    let (digits, shift) = match trimmed.chars().last() {
        Some('K' | 'k') => (&trimmed[..trimmed.len() - 1], 10),
        Some('M' | 'm') => (&trimmed[..trimmed.len() - 1], 20),
        Some('G' | 'g') => (&trimmed[..trimmed.len() - 1], 30),
        _ => (trimmed, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Refused::new(format!("'{text}' is not a size")).with_help("write 64M or 1G"))
}

/// `bytes` as a person writes it: in the largest unit that divides it.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    match bytes {
        b if b != 0 && b.is_multiple_of(1 << 30) => format!("{}G", b >> 30),
        b if b != 0 && b.is_multiple_of(1 << 20) => format!("{}M", b >> 20),
        b if b != 0 && b.is_multiple_of(1 << 10) => format!("{}K", b >> 10),
        b => format!("{b}"),
    }
}

/// A span of time, written as `250us`, `50ms`, `30s` or `2m`.
///
/// # Errors
/// Not a time, or zero.
pub fn duration(text: &str) -> Result<Duration, Refused> {
    let refused = |why: &str| {
        Refused::new(format!("'{text}' {why}")).with_help("write 250us, 50ms, 30s or 2m")
    };
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .ok_or_else(|| refused("has no unit"))?;
    let (digits, unit) = text.split_at(split);
    let nanos: u64 = match unit {
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        _ => return Err(refused("is not a time")),
    };
    let number: u64 = digits.parse().map_err(|_| refused("is not a time"))?;
    match number.checked_mul(nanos) {
        None => Err(refused("is too long")),
        Some(0) => Err(refused("is no time at all")),
        Some(total) => Ok(Duration::from_nanos(total)),
    }
}

/// One kernel parameter.
///
/// # Errors
/// An unknown name, or a value without the parameter's form.
pub fn param(name: &str, value: &str) -> Result<(), Refused> {
    if name == "bug" {
        return bug(value).map(drop);
    }
    Config::default()
        .set(name, value)
        .map_err(|error| match error {
            ParamError::UnknownName(name) => Refused::new(format!("no kernel parameter '{name}'"))
                .with_help(did_you_mean(name, PARAMS.iter().map(|param| param.name))),
            ParamError::BadValue { name, value, form } => Refused::new(format!(
                "'{value}' is no value for kernel parameter '{name}'"
            ))
            .with_help(format!("write {name}={form}")),
            ParamError::NotAnAssignment(word) => Refused::new(format!("'{word}' is not KEY=VALUE")),
        })
}

/// The seeded bug of this name.
///
/// # Errors
/// There is none.
pub fn bug(name: &str) -> Result<Bug, Refused> {
    name.parse().map_err(|()| {
        Refused::new(format!("no seeded bug '{name}'"))
            .with_help(did_you_mean(name, Bug::ALL.iter().map(|bug| bug.name())))
    })
}

/// The scheduling point of this name.
///
/// # Errors
/// There is none.
pub fn point(name: &str) -> Result<Point, Refused> {
    name.parse().map_err(|()| {
        Refused::new(format!("no scheduling point '{name}'")).with_help(did_you_mean(
            name,
            Point::ALL.iter().map(|point| point.name()),
        ))
    })
}

/// The failpoint of this name.
///
/// # Errors
/// There is none.
pub fn failpoint(name: &str) -> Result<Failpoint, Refused> {
    name.parse().map_err(|()| {
        let names: Vec<&str> = Failpoint::ALL.iter().map(|it| it.name()).collect();
        Refused::new(format!("no failpoint '{name}'"))
            .with_help(format!("one of: {}", names.join(", ")))
    })
}

/// A window of instructions: `flush-issue`, `flush-issue:2`, `flush-issue,pte-clear:1`.
///
/// # Errors
/// No such point, or no number of instructions.
pub fn window(text: &str) -> Result<Window, Refused> {
    let (names, every) = text.split_once(':').unwrap_or((text, "1"));
    let points = names.split(',').map(point);
    let points = points.collect::<Result<Vec<_>, _>>()?;
    if points.contains(&Point::IdleEnter) {
        let problem = "behind idle a vCPU halts: no instruction there is a step that it could take";
        return Err(Refused::new(problem).with_help("name another point"));
    }
    match every.parse() {
        Ok(every) if every > 0 => Ok(Window {
            points: PointSet::of(&points),
            every,
        }),
        _ => Err(
            Refused::new(format!("'{every}' is no number of instructions")).with_help(
                "a window is POINT[,POINT]…[:K]: every K-th instruction behind a POINT".to_owned(),
            ),
        ),
    }
}

/// An address or a number, decimal or with `0x`.
///
/// # Errors
/// Not a number of 64 bits.
pub fn address(text: &str) -> Result<u64, Refused> {
    let digits = text.replace('_', "");
    match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    }
    .map_err(|_| Refused::new(format!("'{text}' is not an address")).with_help("write 0x7fff0000"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_have_units_and_limits() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert_eq!(memory("1G"), Ok(1 << 30));
        assert_eq!(memory("65536k"), Ok(64 << 20));
        assert_eq!(memory("67108864"), Ok(64 << 20));
        let small = memory("1M").unwrap_err();
        assert!(small.problem.contains("the minimum is 16M"), "{small}");
        assert!(
            memory("4G")
                .unwrap_err()
                .problem
                .contains("the maximum is 3G")
        );
        assert!(memory("16777217").unwrap_err().problem.contains("4 KiB"));
        for bad in ["", "M", "-1M", "64X", "1.5G", "99999999999999999999G"] {
            assert!(
                memory(bad).unwrap_err().problem.contains("not a size"),
                "{bad}"
            );
        }
    }

    #[test]
    fn vcpus_are_1_to_16() {
        assert_eq!(vcpus(1), Ok(1));
        assert_eq!(vcpus(16), Ok(16));
        for bad in [0, -1, 17, 1000, i64::MAX] {
            let refused = vcpus(bad).unwrap_err().to_string();
            assert!(
                refused.contains(&bad.to_string()) && refused.contains("1 to 16"),
                "{refused}"
            );
        }
    }

    #[test]
    fn names_of_scenarios_are_names_of_files_and_words_of_a_shell() {
        let longest = "a".repeat(NAME);
        for good in ["unmap-race", "Trace_2.git", "0", longest.as_str()] {
            assert_eq!(scenario_name(good).as_deref(), Ok(good));
        }
        let long = "a".repeat(NAME + 1);
        for bad in [
            "", "../x", "/tmp/x", ".x", "-x", "a b", "a\nb", "\x1b[31m", "$(id)", "é", &long,
        ] {
            let refused = scenario_name(bad).unwrap_err().to_string();
            assert!(!refused.contains(char::is_control), "{refused:?}");
            assert!(refused.contains("at most 64"), "{refused}");
        }
    }

    #[test]
    fn times_need_a_unit() {
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "50", "ms", "5h", "0s", "99999999999999s", "-5s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        assert!(
            bug("shootdown-skip-remot")
                .unwrap_err()
                .to_string()
                .contains("'shootdown-skip-remote'")
        );
        assert!(
            param("flush-ceiling", "1")
                .unwrap_err()
                .to_string()
                .contains("'flush_ceiling'")
        );
        assert!(
            param("bug", "free-before-flsh")
                .unwrap_err()
                .to_string()
                .contains("'free-before-flush'")
        );
        assert!(
            param("poison", "maybe")
                .unwrap_err()
                .to_string()
                .contains("poison=on|off")
        );
        for (name, value) in [
            ("asids", "0"),
            ("asids", "7"),
            ("fault_around", "3"),
            ("file_fault_around", "1024"),
            ("gather_batch", "129"),
            ("swap_readahead", "0"),
        ] {
            let refused = param(name, value).unwrap_err().to_string();
            assert!(refused.contains(&format!("write {name}=1")), "{refused}");
        }
        assert!(
            point("flush-synk")
                .unwrap_err()
                .to_string()
                .contains("'flush-sync'")
        );
        assert!(
            point("zzzzzz")
                .unwrap_err()
                .to_string()
                .contains("one of: syscall-enter")
        );
        assert_eq!(nearest("xyz", ["alpha", "beta"]), None);
    }

    #[test]
    fn addresses_are_decimal_or_hexadecimal() {
        assert_eq!(address("0x7fff_0000"), Ok(0x7fff_0000));
        assert_eq!(address("4096"), Ok(4096));
        assert!(address("7fff").is_err());
    }

    proptest! {
        #[test]
        fn sizes_survive_being_written(pages in (MIN_MEMORY / PAGE_SIZE)..=(MAX_MEMORY / PAGE_SIZE)) {
            let bytes = pages * PAGE_SIZE;
            prop_assert_eq!(memory(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,24}") {
            let _ = (memory(&text), duration(&text), address(&text), bug(&text), point(&text), param(&text, &text));
        }
    }
}
