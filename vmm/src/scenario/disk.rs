//! The disk of a scenario: how large it is, and which of its requests go wrong.

use std::fmt;

use devices::disk::{DEFAULT_SECTORS, Disk, DiskFault, Wrong};

use super::values::Refused;

/// Most sectors of a disk (1 GiB): its contents are memory of the host.
const MOST_SECTORS: u64 = 2 << 20;

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its sectors.
    pub sectors: u64,
    /// Requests that go wrong.
    pub faults: Vec<DiskFault>,
}

impl Default for DiskSpec {
    fn default() -> Self {
        Self {
            sectors: DEFAULT_SECTORS,
            faults: Vec::new(),
        }
    }
}

impl DiskSpec {
    /// The disk for a machine with `cpus` CPUs.
    #[must_use]
    pub fn build(&self, cpus: usize) -> Disk {
        Disk::new(self.sectors, cpus, self.faults.clone())
    }

    /// The table `[disk]` of a scenario; nothing where it would say nothing.
    #[must_use]
    pub fn to_toml(&self) -> String {
        if *self == Self::default() {
            return String::new();
        }
        let faults: Vec<String> = self
            .faults
            .iter()
            .map(|fault| format!("\"{}\"", Shown(*fault)))
            .collect();
        format!(
            "[disk]\nsectors = {}\nfaults = [{}]\n",
            self.sectors,
            faults.join(", ")
        )
    }
}

const FORM: &str = "write error@N or corrupt@N, as corrupt@3: the data of the third request that the disk gets are \
                    spoilt; requests of all vCPUs count, from boot";

/// `error@3`: the third request fails; `corrupt@3`: its data are spoilt.
///
/// # Errors
/// Another text.
pub fn fault(text: &str) -> Result<DiskFault, Refused> {
    let form = || Refused::new(format!("'{text}' is no fault of a disk")).with_help(FORM);
    let (wrong, nth) = text.split_once('@').ok_or_else(form)?;
    let wrong = match wrong {
        "error" => Wrong::Error,
        "corrupt" => Wrong::Corrupt,
        _ => return Err(form()),
    };
    match nth.parse() {
        Ok(nth) if nth > 0 => Ok(DiskFault { wrong, nth }),
        _ => Err(form()),
    }
}

/// Sectors that a disk can have.
///
/// # Errors
/// None or too many.
pub fn sectors(number: i64) -> Result<u64, Refused> {
    match u64::try_from(number) {
        Ok(sectors) if (1..=MOST_SECTORS).contains(&sectors) => Ok(sectors),
        _ => Err(
            Refused::new(format!("{number} sectors: a disk has 1 to {MOST_SECTORS}"))
                .with_help("a sector has 512 bytes"),
        ),
    }
}

struct Shown(DiskFault);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong = match self.0.wrong {
            Wrong::Error => "error",
            Wrong::Corrupt => "corrupt",
        };
        write!(f, "{wrong}@{}", self.0.nth)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::scenario;

    #[test]
    fn other_texts_and_sizes_are_refused_with_the_form() {
        for bad in [
            "",
            "error",
            "error@",
            "error@0",
            "error@x",
            "late@1",
            "corrupt@-1",
        ] {
            let refused = fault(bad).unwrap_err().to_string();
            assert!(refused.contains("corrupt@N"), "{bad}: {refused}");
        }
        assert!(sectors(0).is_err() && sectors(-1).is_err() && sectors(i64::MAX).is_err());
        assert_eq!(sectors(8), Ok(8));
    }

    proptest! {
        #[test]
        fn a_scenario_keeps_its_disk(sectors in 1u64..4096, nths in prop::collection::vec((any::<bool>(), 1u64..), 0..4)) {
            let faults = nths.into_iter().map(|(error, nth)| DiskFault {
                wrong: if error { Wrong::Error } else { Wrong::Corrupt },
                nth,
            });
            let disk = DiskSpec { sectors, faults: faults.collect() };
            let text = format!("[program]\nname = 'smoke'\n{}", disk.to_toml());
            let read = scenario::parse(Path::new("x.toml"), &text).unwrap();
            prop_assert_eq!(&read.disk, &disk);
            let again = scenario::parse(Path::new("x.toml"), &read.to_toml()).unwrap();
            prop_assert_eq!(&again.disk, &disk);
        }
    }
}
