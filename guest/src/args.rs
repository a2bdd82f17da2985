//! Arguments of programs: `key=value`, numbers or one of a few words, each with a default.

use core::fmt;
use core::ops::RangeInclusive;

use crate::programs::{PROGRAMS, Program};

/// One argument of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arg {
    /// The key.
    pub name: &'static str,
    /// The value where none is given. Where it is `auto`, `auto` may be given too. Where it is words,
    /// `first|second|third`, one of them must be given, which stands for its index; the first is the
    /// default.
    pub default: &'static str,
    /// Numbers that are accepted, or the indices of the words.
    pub range: RangeInclusive<u64>,
    /// What it chooses.
    pub help: &'static str,
}

impl Arg {
    fn takes_auto(&self) -> bool {
        self.default == "auto"
    }

    fn takes_words(&self) -> bool {
        self.default.contains('|')
    }

    /// `Some(None)` is `auto`.
    fn parse(&self, text: &str) -> Option<Option<u64>> {
        if self.takes_auto() && text == "auto" {
            return Some(None);
        }
        let number = if self.takes_words() {
            self.default.split('|').position(|word| word == text)? as u64
        } else {
            text.parse().ok()?
        };
        self.range.contains(&number).then_some(Some(number))
    }

    /// The value where none is given, as it would be given.
    #[must_use]
    pub fn default_text(&self) -> &'static str {
        self.default
            .split_once('|')
            .map_or(self.default, |(first, _)| first)
    }

    /// What is accepted, in a few words.
    #[must_use]
    pub fn form(&self) -> impl fmt::Display + use<> {
        Form {
            words: self.takes_words().then_some(self.default),
            auto: self.takes_auto(),
            range: self.range.clone(),
        }
    }
}

struct Form {
    words: Option<&'static str>,
    auto: bool,
    range: RangeInclusive<u64>,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(words) = self.words {
            return f.write_str(words);
        }
        let auto = if self.auto { "auto or " } else { "" };
        write!(f, "{auto}{} to {}", self.range.start(), self.range.end())
    }
}

/// Why a program cannot be started as asked. The text is one clear line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageError<'a> {
    /// No program has this name.
    UnknownProgram(&'a str),
    /// A word that is not `key=value`.
    NotAnAssignment(&'a str),
    /// The program has no such argument.
    UnknownArgument {
        /// The program.
        program: &'static str,
        /// What was given.
        name: &'a str,
    },
    /// The value is none that the argument takes.
    BadValue {
        /// The program.
        program: &'static str,
        /// The argument.
        arg: &'static Arg,
        /// What was given.
        value: &'a str,
    },
    /// The program needs a data blob that it can read, and there is none, or it is malformed.
    BadData {
        /// The program.
        program: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl fmt::Display for UsageError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownProgram(name) => {
                write!(f, "unknown program `{name}`; there are")?;
                for (i, program) in PROGRAMS.iter().enumerate() {
                    write!(f, "{} {}", if i == 0 { "" } else { "," }, program.name)?;
                }
                Ok(())
            }
            Self::NotAnAssignment(word) => {
                write!(f, "program argument `{word}` is not of the form key=value")
            }
            Self::UnknownArgument { program, name } => {
                write!(f, "{program} has no argument `{name}`; it takes")?;
                let args = crate::find(program).map_or(&[][..], |program| program.args);
                for (i, arg) in args.iter().enumerate() {
                    write!(f, "{} {}", if i == 0 { "" } else { "," }, arg.name)?;
                }
                if args.is_empty() {
                    f.write_str(" none")
                } else {
                    Ok(())
                }
            }
            Self::BadValue {
                program,
                arg,
                value,
            } => write!(f, "{program}: {}=`{value}` is not {}", arg.name, arg.form()),
            Self::BadData { program, reason } => write!(f, "{program}: the data blob {reason}"),
        }
    }
}

impl core::error::Error for UsageError<'_> {}

/// The checked arguments of one start of a program.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    program: &'static Program,
    /// NUL-terminated `key=value` words, as on the argument page.
    words: &'a str,
}

fn split(words: &str) -> impl DoubleEndedIterator<Item = &str> {
    words.split('\0').filter(|word| !word.is_empty())
}

impl<'a> Args<'a> {
    /// Checks every word of `words` (`key=value`, separated by NUL) against the program's table.
    ///
    /// # Errors
    /// The first word that is malformed, unknown or out of range.
    pub fn parse(program: &'static Program, words: &'a str) -> Result<Self, UsageError<'a>> {
        for word in split(words) {
            let (name, value) = word
                .split_once('=')
                .ok_or(UsageError::NotAnAssignment(word))?;
            let arg = program.args.iter().find(|arg| arg.name == name);
            let arg = arg.ok_or(UsageError::UnknownArgument {
                program: program.name,
                name,
            })?;
            arg.parse(value).ok_or(UsageError::BadValue {
                program: program.name,
                arg,
                value,
            })?;
        }
        Ok(Self { program, words })
    }

    /// The value of `name`, `None` for `auto`.
    ///
    /// # Panics
    /// Where the program's table has no such argument, or its default is malformed.
    #[must_use]
    pub fn auto(&self, name: &str) -> Option<u64> {
        let arg = self.program.args.iter().find(|arg| arg.name == name);
        let arg = arg.expect("a program asks for arguments of its own table");
        let given = split(self.words).rev().find_map(|word| {
            word.split_once('=')
                .filter(|(key, _)| *key == name)
                .and_then(|(_, value)| arg.parse(value))
        });
        given
            .or_else(|| arg.parse(arg.default_text()))
            .expect("defaults parse")
    }

    /// The value of `name`, an argument without `auto`.
    ///
    /// # Panics
    /// As [`Args::auto`], or where the argument takes `auto`.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.auto(name).expect("the argument takes no `auto`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_parses_and_every_name_is_unique() {
        for program in PROGRAMS {
            for (i, arg) in program.args.iter().enumerate() {
                assert!(
                    arg.parse(arg.default_text()).is_some(),
                    "{} {}",
                    program.name,
                    arg.name
                );
                assert!(program.args[..i].iter().all(|other| other.name != arg.name));
            }
        }
    }

    #[test]
    fn the_last_assignment_counts_and_defaults_fill_in() {
        let program = crate::find("unmap-race").unwrap();
        let args = Args::parse(program, "pages=4\0pages=5\0").unwrap();
        assert_eq!(args.number("pages"), 5);
        assert_eq!(args.number("rounds"), 50);
        assert_eq!(args.auto("readers"), None);
        assert_eq!(
            Args::parse(program, "readers=3").unwrap().auto("readers"),
            Some(3)
        );
    }

    #[test]
    fn a_word_stands_for_its_place_and_nothing_else_is_accepted() {
        let program = crate::find("crash").unwrap();
        let how = |words| Args::parse(program, words).map(|args| args.number("how"));
        assert_eq!(how(""), Ok(0));
        assert_eq!(how("how=panic"), Ok(0));
        assert_eq!(how("how=hang"), Ok(2));
        for bad in ["how=1", "how=pan", "how=panic|wild", "how="] {
            let text = how(bad).unwrap_err().to_string();
            assert!(text.ends_with("is not panic|wild|hang|user-spin"), "{text}");
        }
    }

    #[test]
    fn bad_words_are_named() {
        let program = crate::find("unmap-race").unwrap();
        let text = |words| Args::parse(program, words).unwrap_err().to_string();
        assert_eq!(
            text("pages"),
            "program argument `pages` is not of the form key=value"
        );
        assert_eq!(
            text("page=1"),
            "unmap-race has no argument `page`; it takes pages, rounds, readers, linger"
        );
        assert_eq!(text("pages=0"), "unmap-race: pages=`0` is not 1 to 1024");
        assert_eq!(
            text("pages=auto"),
            "unmap-race: pages=`auto` is not 1 to 1024"
        );
        assert_eq!(
            UsageError::UnknownProgram("x").to_string(),
            "unknown program `x`; there are smoke, unmap-race, cow-fork, mprotect-race, stress, litmus, huge, vma, groups, direct, pressure, writeback, file-io, replay, oracle, crash, exit, bench"
        );
    }
}
