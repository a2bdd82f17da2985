//! How a run in which vCPUs run at once is disturbed: delays at scheduling points, and faults of IPIs.
//!
//! Both are written the same way, on the command line and in a scenario: `WHERE[:WHEN]=WHAT`. Blanks do not count.
//!
//! - a delay: `POINT[@VCPU][:WHEN]=TIME`, as `flush-dispatch@0=50us`
//! - a fault: `VECTOR[@FROM-TO][:WHEN]=FAULT`, as `shootdown@0-1:every3=drop`
//!
//! `docs/parallel.md` is the manual.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use abi::boot::InterruptMode;
use abi::point::Point;

use super::values::{self, Refused};

/// Longest delay: a vCPU that is held shows no sign of life, and must not look hung.
pub const LONGEST: Duration = Duration::from_secs(1);
/// How long `until` waits where nothing else is said.
const PATIENCE: Duration = Duration::from_millis(10);
/// How long an IPI waits to be overtaken where nothing else is said.
const OVERTAKE: Duration = Duration::from_millis(1);

/// Vectors that the kernel sends (`guest_kernel::arch::Ipi`).
const VECTORS: [(&str, u8); 2] = [("shootdown", 0xf0), ("reschedule", 0xf1)];

/// Which of the passages that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// All.
    Always,
    /// Every N-th.
    Every(u64),
    /// The N-th alone.
    Nth(u64),
    /// Each with this probability, in millionths.
    Chance(u32),
}

/// A time, drawn anew each time where both ends differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The least.
    pub least: Duration,
    /// The most.
    pub most: Duration,
}

/// What a vCPU waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// A time.
    Time(Span),
    /// Another vCPU at a point.
    Until {
        /// The point.
        point: Point,
        /// The vCPU; none for whichever other.
        vcpu: Option<usize>,
        /// At most this long.
        timeout: Duration,
    },
}

/// Holds a vCPU at a point while others run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// Where.
    pub point: Point,
    /// Who; none for every vCPU.
    pub vcpu: Option<usize>,
    /// Which passages.
    pub when: When,
    /// What it waits for.
    pub hold: Hold,
}

/// What becomes of an IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It arrives later.
    Delay(Span),
    /// It does not arrive.
    Drop,
    /// It arrives twice: again when it was taken.
    Duplicate,
    /// It arrives after the next IPI to the same vCPU was taken, or after this time.
    Reorder(Duration),
}

/// A fault of IPIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiFault {
    /// Which vector; none for each.
    pub vector: Option<u8>,
    /// From whom.
    pub from: Option<usize>,
    /// To whom.
    pub to: Option<usize>,
    /// Which of these.
    pub when: When,
    /// What becomes of it.
    pub fault: Fault,
}

/// All that disturbs a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disturb {
    /// Delays; the first that matches counts.
    pub delays: Vec<Delay>,
    /// Faults of IPIs; the first that matches counts.
    pub ipis: Vec<IpiFault>,
    /// Seed of what is drawn.
    pub seed: u64,
}

impl Disturb {
    /// True where nothing is disturbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.delays.is_empty() && self.ipis.is_empty()
    }

    /// Checks that a machine of `vcpus` vCPUs with such `interrupts` can do it.
    ///
    /// # Errors
    /// A vCPU that it has not, or faults of IPIs that it does not see.
    pub fn check(&self, vcpus: u32, interrupts: InterruptMode) -> Result<(), Refused> {
        let exists = |vcpu: Option<usize>, rule: &dyn fmt::Display| match vcpu {
            Some(vcpu) if vcpu >= vcpus as usize => {
                let problem = format!("{rule}: this machine has no vCPU {vcpu}");
                Err(Refused::new(problem).with_help(format!("0 to {}", vcpus - 1)))
            }
            _ => Ok(()),
        };
        for delay in &self.delays {
            exists(delay.vcpu, delay)?;
            if let Hold::Until { vcpu, .. } = delay.hold {
                exists(vcpu, delay)?;
            }
        }
        for ipi in &self.ipis {
            exists(ipi.from, ipi)?;
            exists(ipi.to, ipi)?;
            if interrupts != InterruptMode::Controlled {
                let problem = format!("{ipi}: with hardware interrupts no IPI passes the host");
                return Err(Refused::new(problem).with_help("--interrupts controlled"));
            }
        }
        Ok(())
    }
}

impl FromStr for Delay {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        const FORM: &str = "write POINT[@VCPU][:everyN|:nthN|:pF]=TIME, where TIME is 50us, 0..200us or \
                            until:POINT[@VCPU][,TIMEOUT]";
        let rule = Rule::split(text, FORM)?;
        let point = values::point(rule.name)?;
        let vcpu = rule.place.map(self::vcpu).transpose()?;
        let hold = match rule.what.strip_prefix("until:") {
            None => Hold::Time(span(&rule.what)?),
            Some(rest) => {
                let (place, timeout) = match rest.split_once(',') {
                    Some((place, timeout)) => (place, bounded(timeout)?),
                    None => (rest, PATIENCE),
                };
                let (name, other) = match place.split_once('@') {
                    Some((name, other)) => (name, Some(self::vcpu(other)?)),
                    None => (place, None),
                };
                Hold::Until {
                    point: values::point(name)?,
                    vcpu: other,
                    timeout,
                }
            }
        };
        Ok(Self {
            point,
            vcpu,
            when: rule.when,
            hold,
        })
    }
}

impl FromStr for IpiFault {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        const FORM: &str = "write VECTOR[@FROM-TO][:everyN|:nthN|:pF]=FAULT, where FAULT is drop, dup, \
                            reorder[:TIME], delay:50us or delay:0..200us";
        let rule = Rule::split(text, FORM)?;
        let vector = match rule.name {
            "any" => None,
            name => Some(vector(name)?),
        };
        let (from, to) = match rule.place {
            None => (None, None),
            Some(place) => {
                let (from, to) = place.split_once('-').ok_or_else(|| {
                    Refused::new(format!("'{place}' names no sender and target"))
                        .with_help("write FROM-TO: 0-1, any-1, 0-any")
                })?;
                let side = |text: &str| (text != "any").then(|| self::vcpu(text)).transpose();
                (side(from)?, side(to)?)
            }
        };
        let (kind, time) = match rule.what.split_once(':') {
            Some((kind, time)) => (kind, Some(time)),
            None => (rule.what.as_str(), None),
        };
        let fault = match (kind, time) {
            ("drop", None) => Fault::Drop,
            ("dup", None) => Fault::Duplicate,
            ("reorder", None) => Fault::Reorder(OVERTAKE),
            ("reorder", Some(time)) => Fault::Reorder(bounded(time)?),
            ("delay", Some(time)) => Fault::Delay(span(time)?),
            _ => {
                let problem = format!("'{}' is no fault of an IPI", rule.what);
                return Err(Refused::new(problem).with_help(FORM));
            }
        };
        Ok(Self {
            vector,
            from,
            to,
            when: rule.when,
            fault,
        })
    }
}

/// The parts of a rule, `name[@place][:when]=what`.
struct Rule<'a> {
    name: &'a str,
    place: Option<&'a str>,
    when: When,
    what: String,
}

impl<'a> Rule<'a> {
    fn split(text: &'a str, form: &'static str) -> Result<Self, Refused> {
        let refused = || Refused::new(format!("'{text}' is no rule")).with_help(form);
        let (place, what) = text.split_once('=').ok_or_else(refused)?;
        let (place, when) = match place.split_once(':') {
            None => (place, When::Always),
            Some((place, word)) => (place, when(&dense(word))?),
        };
        let (name, place) = match place.split_once('@') {
            Some((name, place)) => (name, Some(place.trim())),
            None => (place, None),
        };
        Ok(Self {
            name: name.trim(),
            place,
            when,
            what: dense(what),
        })
    }
}

fn dense(text: &str) -> String {
    text.split_whitespace().collect()
}

fn when(text: &str) -> Result<When, Refused> {
    let refused = || {
        Refused::new(format!("'{text}' does not say which passages"))
            .with_help("every3, nth3 (counted from 1) or p0.1")
    };
    let count = |text: &str| {
        text.parse()
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(refused)
    };
    if let Some(number) = text.strip_prefix("every") {
        Ok(When::Every(count(number)?))
    } else if let Some(number) = text.strip_prefix("nth") {
        Ok(When::Nth(count(number)?))
    } else {
        let number = text
            .strip_prefix('p')
            .and_then(|number| number.parse::<f64>().ok());
        match number {
            Some(chance) if chance > 0.0 && chance <= 1.0 => {
                Ok(When::Chance((chance * 1e6).ceil() as u32))
            }
            _ => Err(refused()),
        }
    }
}

fn vcpu(text: &str) -> Result<usize, Refused> {
    let text = text.trim();
    text.parse()
        .map_err(|_| Refused::new(format!("'{text}' is no vCPU")).with_help("a number, from 0"))
}

fn vector(text: &str) -> Result<u8, Refused> {
    if let Some((_, vector)) = VECTORS.iter().find(|(name, _)| *name == text) {
        return Ok(*vector);
    }
    let number = values::address(text)
        .ok()
        .and_then(|number| u8::try_from(number).ok());
    number.filter(|vector| *vector >= 16).ok_or_else(|| {
        Refused::new(format!("'{text}' is no vector of an IPI"))
            .with_help("shootdown, reschedule, any, or a number from 16 to 255")
    })
}

/// A time that a vCPU may be held for.
fn bounded(text: &str) -> Result<Duration, Refused> {
    let time = values::duration(text)?;
    if time > LONGEST {
        let problem = format!("{text} is too long: a vCPU that is held must not look hung");
        return Err(Refused::new(problem).with_help("1s at most"));
    }
    Ok(time)
}

/// `50us`, `0..200us`, `10us..1ms`.
fn span(text: &str) -> Result<Span, Refused> {
    let Some((least, most)) = text.split_once("..") else {
        let time = bounded(text)?;
        return Ok(Span {
            least: time,
            most: time,
        });
    };
    let most = bounded(most)?;
    let least = match least {
        "0" => Duration::ZERO,
        least => bounded(least)?,
    };
    if least > most {
        let problem = format!("{text} is empty");
        return Err(Refused::new(problem).with_help("the shorter time comes first"));
    }
    Ok(Span { least, most })
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => Ok(()),
            Self::Every(count) => write!(f, ":every{count}"),
            Self::Nth(count) => write!(f, ":nth{count}"),
            Self::Chance(millionths) => write!(f, ":p{}", f64::from(*millionths) / 1e6),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.least == self.most {
            write!(f, "{}us", self.most.as_micros())
        } else if self.least.is_zero() {
            write!(f, "0..{}us", self.most.as_micros())
        } else {
            write!(
                f,
                "{}us..{}us",
                self.least.as_micros(),
                self.most.as_micros()
            )
        }
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.point.name())?;
        if let Some(vcpu) = self.vcpu {
            write!(f, "@{vcpu}")?;
        }
        write!(f, "{}=", self.when)?;
        match self.hold {
            Hold::Time(span) => span.fmt(f),
            Hold::Until {
                point,
                vcpu,
                timeout,
            } => {
                write!(f, "until:{}", point.name())?;
                if let Some(vcpu) = vcpu {
                    write!(f, "@{vcpu}")?;
                }
                write!(f, ",{}us", timeout.as_micros())
            }
        }
    }
}

impl fmt::Display for IpiFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vector {
            None => f.write_str("any")?,
            Some(vector) => f.write_str(&vector_name(vector))?,
        }
        if self.from.is_some() || self.to.is_some() {
            let side = |side: Option<usize>| side.map_or("any".into(), |vcpu| vcpu.to_string());
            write!(f, "@{}-{}", side(self.from), side(self.to))?;
        }
        write!(f, "{}=", self.when)?;
        match self.fault {
            Fault::Delay(span) => write!(f, "delay:{span}"),
            Fault::Drop => f.write_str("drop"),
            Fault::Duplicate => f.write_str("dup"),
            Fault::Reorder(time) => write!(f, "reorder:{}us", time.as_micros()),
        }
    }
}

/// The name of a vector, or its number.
#[must_use]
pub fn vector_name(vector: u8) -> String {
    let known = VECTORS.iter().find(|(_, number)| *number == vector);
    known.map_or_else(|| format!("{vector:#x}"), |(name, _)| (*name).to_owned())
}

#[cfg(test)]
mod tests;
