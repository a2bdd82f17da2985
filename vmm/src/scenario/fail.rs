//! Armed failpoints: which passage of which failpoint fails, on which vCPU.

use std::fmt;
use std::str::FromStr;

use abi::failpoint::Failpoint;

use super::values::{self, Refused};

/// One passage that fails, counted from the start of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fail {
    /// What fails.
    pub failpoint: Failpoint,
    /// On which vCPU.
    pub vcpu: usize,
    /// Its passage there, from 1.
    pub passage: u32,
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}@{}:{}",
            self.failpoint.name(),
            self.vcpu,
            self.passage
        )
    }
}

impl FromStr for Fail {
    type Err = Refused;

    /// `NAME@VCPU:N`.
    fn from_str(text: &str) -> Result<Self, Refused> {
        let form = || Refused::new(format!("'{text}' is no failpoint")).with_help(FORM);
        let (name, place) = text.split_once('@').ok_or_else(form)?;
        let failpoint = values::failpoint(name)?;
        let (vcpu, passage) = place.split_once(':').ok_or_else(form)?;
        match (vcpu.parse(), passage.parse()) {
            (Ok(vcpu), Ok(passage)) if passage > 0 => Ok(Self {
                failpoint,
                vcpu,
                passage,
            }),
            _ => Err(form()),
        }
    }
}

const FORM: &str = "write NAME@VCPU:N, as slab-alloc@0:3: the third passage on vCPU 0 fails; \
                    passages count from 1";

/// Checks that a machine with `vcpus` vCPUs can have all of `fails` armed at once.
///
/// # Errors
/// A vCPU that it has not, or a failpoint that is armed twice on one vCPU: each counts one passage down.
pub fn check(fails: &[Fail], vcpus: u32) -> Result<(), Refused> {
    for (index, fail) in fails.iter().enumerate() {
        if fail.vcpu >= vcpus as usize {
            let all: Vec<String> = (0..vcpus).map(|vcpu| vcpu.to_string()).collect();
            let problem = format!("{fail}: this machine has no vCPU {}", fail.vcpu);
            return Err(Refused::new(problem).with_help(format!("one of: {}", all.join(", "))));
        }
        let place = |fail: &Fail| (fail.failpoint, fail.vcpu);
        if fails[..index]
            .iter()
            .any(|other| place(other) == place(fail))
        {
            let (name, vcpu) = (fail.failpoint.name(), fail.vcpu);
            let problem = format!("{name} is armed twice on vCPU {vcpu}");
            return Err(Refused::new(problem).with_help("one passage of it can fail there"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unknown_names_and_vcpus_are_told_what_there_is() {
        let refused = "slab@0:1".parse::<Fail>().unwrap_err().to_string();
        for failpoint in Failpoint::ALL {
            assert!(refused.contains(failpoint.name()), "{refused}");
        }
        let fail: Fail = "frame-alloc@2:1".parse().unwrap();
        let refused = check(&[fail], 2).unwrap_err().to_string();
        assert!(
            refused.contains("no vCPU 2") && refused.contains("0, 1"),
            "{refused}"
        );
        check(&[fail], 3).unwrap();
        let other: Fail = "frame-alloc@2:7".parse().unwrap();
        assert!(check(&[fail, other], 3).is_err());
        check(&[fail, "slab-alloc@2:1".parse().unwrap()], 3).unwrap();
        for bad in [
            "",
            "slab-alloc",
            "slab-alloc@0",
            "slab-alloc@0:0",
            "slab-alloc@x:1",
        ] {
            assert!(bad.parse::<Fail>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(vcpu in 0usize..16, passage in 1u32..) {
            for &failpoint in Failpoint::ALL {
                let fail = Fail { failpoint, vcpu, passage };
                prop_assert_eq!(fail.to_string().parse(), Ok(fail));
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,24}") {
            let _ = text.parse::<Fail>();
        }
    }
}
