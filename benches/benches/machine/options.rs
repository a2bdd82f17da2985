//! The command line.

use std::fmt;
use std::path::PathBuf;

pub(crate) const HELP: &str = "\
usage: machine [--bench] [--quick] [--json FILE] [FILTER]

  --bench      measure (cargo bench gives this); without it, a few times only, as --quick
  --quick      a few times only, to see that it works: no percentiles
  --json FILE  also write everything to FILE
  FILTER       only what has this in its name: machine/boot, machine/run, machine/reset, and machine/pause/user/N,
               machine/pause/kernel/N for machines of N vCPUs busy at CPL 3 and in the kernel";

/// What was asked for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    pub(crate) json: Option<PathBuf>,
    filter: Option<String>,
}

/// Why nothing is measured.
#[derive(Debug)]
pub(crate) enum Usage {
    Help,
    Wrong(String),
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Help => f.write_str(HELP),
            Self::Wrong(what) => f.write_str(what),
        }
    }
}

impl Options {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Usage> {
        let mut options = Self::default();
        let mut bench = false;
        while let Some(word) = words.next() {
            match word.as_str() {
                "--bench" => bench = true,
                "--quick" => options.quick = true,
                "--help" | "-h" => return Err(Usage::Help),
                "--json" => {
                    let file = words.next().ok_or(wrong("--json needs a file"))?;
                    options.json = Some(file.into());
                }
                option if option.starts_with('-') => {
                    return Err(wrong(&format!("there is no option {option}")));
                }
                _ if options.filter.is_some() => return Err(wrong("only one FILTER is possible")),
                _ => options.filter = Some(word),
            }
        }
        options.quick |= !bench;
        Ok(options)
    }

    /// Whether the measurement called `name` is wanted.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|filter| name.contains(filter.as_str()))
    }
}

fn wrong(what: &str) -> Usage {
    Usage::Wrong(what.to_owned())
}
