//! Values of options, as they are written.

use std::path::{Path, PathBuf};
use std::time::Duration;

use abi::bug::Bug;
use abi::failpoint::Failpoint;
use abi::point::Point;
use clap::builder::{PathBufValueParser, TypedValueParser};

use crate::bench::Op;
use crate::engine::Window;
use crate::scenario::disturb::{Delay, IpiFault};
use crate::scenario::{Fail, values};

/// Most engines at once.
const MAX_JOBS: usize = 64;

/// A passage of a scheduling point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The point.
    pub point: Point,
    /// Which passage, from 1.
    pub nth: u64,
}

/// A file that is written. Only `--json` can go to stdout.
pub(super) fn file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path == Path::new("-") {
        true => Err("this writes a file, not stdout: name one (./- for a file of that name)"),
        false => Ok(path),
    })
}

/// A directory that files are written to.
pub(super) fn directory() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path == Path::new("-") {
        true => Err("files go to a directory, not to stdout: name one (./- for one of that name)"),
        false => Ok(path),
    })
}

pub(super) fn vcpus(text: &str) -> Result<u32, String> {
    let count = text
        .parse()
        .map_err(|_| format!("'{text}' is not a number"))?;
    values::vcpus(count).map_err(|refused| refused.to_string())
}

pub(super) fn memory(text: &str) -> Result<u64, String> {
    values::memory(text).map_err(|refused| refused.to_string())
}

pub(super) fn op(text: &str) -> Result<Op, String> {
    let known = Op::ALL.iter().find(|op| op.name() == text);
    known.copied().ok_or_else(|| {
        let names: Vec<&str> = Op::ALL.iter().map(|op| op.name()).collect();
        format!("there is {}", names.join(", "))
    })
}

pub(super) fn jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(jobs @ 1..=MAX_JOBS) => Ok(jobs),
        _ => Err(format!(
            "1 to {MAX_JOBS}: each is an engine with its own guest memory"
        )),
    }
}

pub(super) fn window(text: &str) -> Result<Window, String> {
    values::window(text).map_err(|refused| refused.to_string())
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    values::duration(text).map_err(|refused| refused.to_string())
}

pub(super) fn address(text: &str) -> Result<u64, String> {
    values::address(text).map_err(|refused| refused.to_string())
}

pub(super) fn bug(text: &str) -> Result<Bug, String> {
    values::bug(text).map_err(|refused| refused.to_string())
}

pub(super) fn fail(text: &str) -> Result<Fail, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

pub(super) fn delay(text: &str) -> Result<Delay, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

pub(super) fn ipi(text: &str) -> Result<IpiFault, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

pub(super) fn failpoint(text: &str) -> Result<Failpoint, String> {
    values::failpoint(text).map_err(|refused| refused.to_string())
}

pub(super) fn param(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| "write KEY=VALUE; `list params` shows all".to_owned())?;
    values::param(key, value).map_err(|refused| refused.to_string())?;
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) fn at(text: &str) -> Result<At, String> {
    let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
    let point = values::point(name).map_err(|refused| refused.to_string())?;
    match nth.parse() {
        Ok(nth) if nth > 0 => Ok(At { point, nth }),
        _ => Err(format!("'{nth}' is no passage: they count from 1")),
    }
}

pub(super) fn range(text: &str) -> Result<(u64, u64), String> {
    let (start, end) = text
        .split_once("..")
        .ok_or("write START..END, as 0x400000..0x500000")?;
    let (start, end) = (address(start)?, address(end)?);
    if start < end {
        Ok((start, end))
    } else {
        Err(format!("{start:#x}..{end:#x} is empty"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_and_ranges() {
        assert_eq!(
            at("pte-install"),
            Ok(At {
                point: Point::PteInstall,
                nth: 1
            })
        );
        assert_eq!(
            at("flush-sync:12"),
            Ok(At {
                point: Point::FlushSync,
                nth: 12
            })
        );
        assert!(at("flush-sync:0").unwrap_err().contains("from 1"));
        assert!(at("flush").unwrap_err().contains("flush-"));
        assert_eq!(range("0x1000..0x2000"), Ok((0x1000, 0x2000)));
        assert!(range("0x2000..0x1000").unwrap_err().contains("empty"));
        assert!(range("0x2000").is_err());
    }
}
