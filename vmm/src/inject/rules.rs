//! Rules, and how they are written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use abi::point::Point;

use crate::scenario::values::{self, Refused};

/// Everything that is done to a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Delays at points.
    pub delays: Vec<Delay>,
    /// Faults of IPIs; they need controlled interrupts.
    pub ipis: Vec<IpiFault>,
    /// Of which stream of random numbers.
    pub seed: u64,
}

impl Rules {
    /// True where nothing is done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.delays.is_empty() && self.ipis.is_empty()
    }
}

/// A vCPU that reaches a point waits there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// The point.
    pub point: Point,
    /// Only this vCPU.
    pub vcpu: Option<usize>,
    /// Every how many passages, from 1.
    pub every: u64,
    /// How long.
    pub how_long: HowLong,
}

/// How long a vCPU waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HowLong {
    /// This long.
    Fixed(Duration),
    /// A random time between these.
    Between(Duration, Duration),
    /// Until another vCPU passes a point, but no longer than a time.
    Until {
        /// The point.
        point: Point,
        /// That vCPU; else any other.
        vcpu: Option<usize>,
        /// At most.
        most: Duration,
    },
}

/// Longest wait for a point that is not passed, where the rule says none.
const MOST: Duration = Duration::from_millis(10);

/// Something that happens to IPIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiFault {
    /// What.
    pub kind: IpiFaultKind,
    /// Only to this vCPU.
    pub target: Option<usize>,
    /// Every how many IPIs, from 1.
    pub every: u64,
}

/// What happens to an IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpiFaultKind {
    /// It never arrives.
    Drop,
    /// It arrives a second time a little later.
    Duplicate,
    /// It arrives after the next one that anybody is sent, or a little later.
    Reorder,
    /// It arrives this much later.
    Delay(Duration),
}

const DELAY_FORM: &str = "write POINT[@VCPU][/N]=HOW, where every N-th passage waits and HOW is 50us, 0..200us, \
                          until:POINT[@VCPU] or until:POINT[@VCPU],5ms";
const IPI_FORM: &str = "write drop, dup, reorder or delay, then [/N] (every N-th), [@VCPU] (only to it), and for delay =TIME: \
                        drop/3, dup@1, delay/2@0=100us";

impl FromStr for Delay {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        let form = || Refused::new(format!("'{text}' is no delay")).with_help(DELAY_FORM);
        let (place, how_long) = text.split_once('=').ok_or_else(form)?;
        let (place, every) = counted(place).ok_or_else(form)?;
        let (point, vcpu) = placed(place).ok_or_else(form)?;
        Ok(Self {
            point: values::point(point)?,
            vcpu,
            every,
            how_long: how_long.parse()?,
        })
    }
}

impl FromStr for HowLong {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        if let Some(rest) = text.strip_prefix("until:") {
            let (place, most) = match rest.split_once(',') {
                Some((place, most)) => (place, values::duration(most)?),
                None => (rest, MOST),
            };
            let form = || Refused::new(format!("'{place}' is no place")).with_help(DELAY_FORM);
            let (point, vcpu) = placed(place).ok_or_else(form)?;
            let point = values::point(point)?;
            return Ok(Self::Until { point, vcpu, most });
        }
        match text.split_once("..") {
            Some((least, most)) => {
                let least = match least {
                    "0" => Duration::ZERO,
                    least => values::duration(least)?,
                };
                let most = values::duration(most)?;
                if least > most {
                    let problem = format!("'{text}' ends before it begins");
                    return Err(Refused::new(problem).with_help(DELAY_FORM));
                }
                Ok(Self::Between(least, most))
            }
            None => Ok(Self::Fixed(values::duration(text)?)),
        }
    }
}

impl FromStr for IpiFault {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        let form = || Refused::new(format!("'{text}' is no IPI fault")).with_help(IPI_FORM);
        let (what, time) = match text.split_once('=') {
            Some((what, time)) => (what, Some(values::duration(time)?)),
            None => (text, None),
        };
        let (what, target) = placed(what).ok_or_else(form)?;
        let (what, every) = counted(what).ok_or_else(form)?;
        let kind = match (what, time) {
            ("drop", None) => IpiFaultKind::Drop,
            ("dup", None) => IpiFaultKind::Duplicate,
            ("reorder", None) => IpiFaultKind::Reorder,
            ("delay", Some(time)) => IpiFaultKind::Delay(time),
            _ => return Err(form()),
        };
        Ok(Self {
            kind,
            target,
            every,
        })
    }
}

/// `NAME@VCPU` or `NAME`.
fn placed(text: &str) -> Option<(&str, Option<usize>)> {
    match text.split_once('@') {
        Some((name, vcpu)) => Some((name, Some(vcpu.parse().ok()?))),
        None => Some((text, None)),
    }
}

/// `NAME/N` or `NAME`.
fn counted(text: &str) -> Option<(&str, u64)> {
    match text.split_once('/') {
        Some((name, every)) => {
            let every = every.parse().ok().filter(|every| *every > 0)?;
            Some((name, every))
        }
        None => Some((text, 1)),
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.point.name())?;
        at(f, self.vcpu)?;
        if self.every > 1 {
            write!(f, "/{}", self.every)?;
        }
        match self.how_long {
            HowLong::Fixed(time) => write!(f, "={time:?}"),
            HowLong::Between(least, most) => write!(f, "={least:?}..{most:?}"),
            HowLong::Until { point, vcpu, most } => {
                write!(f, "=until:{}", point.name())?;
                at(f, vcpu)?;
                write!(f, ",{most:?}")
            }
        }
    }
}

impl fmt::Display for IpiFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            IpiFaultKind::Drop => "drop",
            IpiFaultKind::Duplicate => "dup",
            IpiFaultKind::Reorder => "reorder",
            IpiFaultKind::Delay(_) => "delay",
        })?;
        if self.every > 1 {
            write!(f, "/{}", self.every)?;
        }
        at(f, self.target)?;
        match self.kind {
            IpiFaultKind::Delay(time) => write!(f, "={time:?}"),
            _ => Ok(()),
        }
    }
}

fn at(f: &mut fmt::Formatter<'_>, vcpu: Option<usize>) -> fmt::Result {
    vcpu.map_or(Ok(()), |vcpu| write!(f, "@{vcpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in [
            "pte-clear=50us",
            "pte-clear@1/3=0..200us",
            "flush-issue@0=until:flush-sync@1,5ms",
            "lock-acquire=until:pte-clear,10ms",
        ] {
            let delay: Delay = text.parse().unwrap();
            let again = delay.to_string().replace("=0ns", "=0");
            assert_eq!(again.replace('µ', "u"), text);
        }
        for text in ["drop/3", "dup@1", "reorder", "delay/2@0=100us"] {
            let fault: IpiFault = text.parse().unwrap();
            assert_eq!(fault.to_string().replace('µ', "u"), text);
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_the_form() {
        for text in [
            "pte-clear",
            "pte-clear@x=1us",
            "pte-clear/0=1us",
            "pte-clear=9us..1us",
            "pte-clear=until:pte-clear@x",
        ] {
            let error = text.parse::<Delay>().unwrap_err().to_string();
            assert!(error.contains("POINT[@VCPU]"), "{text}: {error}");
        }
        assert!(
            "pte-cleer=1us"
                .parse::<Delay>()
                .unwrap_err()
                .to_string()
                .contains("pte-clear")
        );
        for text in ["lose", "drop=1us", "delay", "dup/0", "drop@a"] {
            let error = text.parse::<IpiFault>().unwrap_err().to_string();
            assert!(error.contains("drop, dup"), "{text}: {error}");
        }
    }
}
