//! Reads the text of a trace.

use std::ops::Range;

use abi::syscall::Errno;

use super::names::{ADVICE, CLONE, MAP, Names, PROT, errno_by_name};
use super::{Call, Entry, FORMAT, File, Outcome, Trace, VERSION};

/// Where and why a text is no trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: found {found}, expected {expected}")]
pub struct ParseError {
    /// Bytes of the text that are wrong.
    pub span: Range<usize>,
    /// Line, from 1.
    pub line: usize,
    /// Column, in characters, from 1.
    pub column: usize,
    /// What is there: `` `text` `` or "the end of the line".
    pub found: String,
    /// What would be accepted.
    pub expected: String,
}

const CALLS: &str = "a call (mmap, munmap, mprotect, mremap, brk, madvise, clone, clone3, fork, \
                     vfork, execve, exit, exit_group or killed)";

/// Reads a trace.
///
/// # Errors
/// The first thing in the text that the format does not have.
pub fn parse(text: &str) -> Result<Trace, ParseError> {
    let mut trace = Trace::default();
    let mut stage = Stage::Format;
    let mut start = 0;
    let mut last = Cursor {
        text: "",
        start: 0,
        line: 1,
        at: 0,
    };
    for (index, raw) in text.split_inclusive('\n').enumerate() {
        let mut cursor = Cursor {
            text: raw.trim_end(),
            start,
            line: index + 1,
            at: 0,
        };
        start += raw.len();
        last = Cursor {
            at: cursor.text.len(),
            ..cursor
        };
        cursor.skip_blanks();
        if cursor.rest().is_empty() || cursor.rest().starts_with('#') {
            continue;
        }
        match (stage, cursor.peek_word()) {
            (Stage::Format, _) => {
                cursor.expect_word(FORMAT, "`stalemate-trace 1` on the first line")?;
                let at = cursor;
                if cursor.number("the format's version")? != VERSION {
                    return Err(at.error(&format!("version {VERSION} of the format")));
                }
                stage = Stage::Header;
            }
            (Stage::Header, "command") => {
                cursor.expect_word("command", "")?;
                while !cursor.at_end() {
                    trace
                        .command
                        .push(cursor.string("a quoted word of the command")?);
                }
            }
            (Stage::Header, "status") => {
                cursor.expect_word("status", "")?;
                trace.status = Some(cursor.signed("an exit status")?);
            }
            (Stage::Header, "file") => {
                cursor.expect_word("file", "")?;
                let number = cursor.signed("the number of a file")?;
                let bytes = cursor.number("its size")?;
                trace.files.push(File { number, bytes });
            }
            _ => {
                stage = Stage::Entries;
                trace.entries.push(entry(&mut cursor)?);
            }
        }
        cursor.end()?;
    }
    match stage {
        Stage::Format => Err(last.error("`stalemate-trace 1` on the first line")),
        _ => Ok(trace),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Format,
    Header,
    Entries,
}

fn entry(cursor: &mut Cursor<'_>) -> Result<Entry, ParseError> {
    let at = *cursor;
    let task = cursor.number("the number of a task")?;
    let task = u32::try_from(task).map_err(|_| at.error("a task number below 2^32"))?;
    let call = call(cursor)?;
    cursor.expect(')')?;
    cursor.expect('=')?;
    let outcome = outcome(cursor)?;
    Ok(Entry {
        line: cursor.line as u64,
        task,
        call,
        outcome,
    })
}

fn call(c: &mut Cursor<'_>) -> Result<Call, ParseError> {
    let at = *c;
    let name = c.word(CALLS)?;
    c.expect('(')?;
    Ok(match name {
        "mmap" => Call::Mmap {
            addr: c.number("an address")?,
            len: c.next_number("a length")?,
            prot: c.next_named(&PROT, "protection")?,
            flags: c.next_named(&MAP, "flags")?,
            fd: c.next(|c| c.signed("a file descriptor or -1"))?,
            offset: c.next_number("a file offset")?,
        },
        "munmap" => Call::Munmap {
            addr: c.number("an address")?,
            len: c.next_number("a length")?,
        },
        "mprotect" => Call::Mprotect {
            addr: c.number("an address")?,
            len: c.next_number("a length")?,
            prot: c.next_named(&PROT, "protection")?,
        },
        "mremap" => Call::Mremap {
            addr: c.number("an address")?,
            old_len: c.next_number("the old length")?,
            new_len: c.next_number("the new length")?,
            flags: c.next_number("flags")?,
            new_addr: c.next_number("the new address")?,
        },
        "brk" => Call::Brk {
            addr: c.number("an address")?,
        },
        "madvise" => Call::Madvise {
            addr: c.number("an address")?,
            len: c.next_number("a length")?,
            advice: c.next_named(&ADVICE, "advice")?,
        },
        "clone" => Call::Clone {
            flags: c.named(&CLONE, "flags")?,
        },
        "clone3" => Call::Clone3 {
            flags: c.named(&CLONE, "flags")?,
        },
        "fork" => Call::Fork,
        "vfork" => Call::Vfork,
        "execve" => Call::Execve {
            path: c.string("a quoted path")?,
        },
        "exit" => Call::Exit {
            status: c.signed("an exit status")?,
        },
        "exit_group" => Call::ExitGroup {
            status: c.signed("an exit status")?,
        },
        "killed" => Call::Killed {
            signal: c.number("the number of a signal")?,
        },
        _ => return Err(at.error(CALLS)),
    })
}

fn outcome(c: &mut Cursor<'_>) -> Result<Outcome, ParseError> {
    let expected = "a result: a number, -ERRNO, or ?";
    c.skip_blanks();
    match c.rest().chars().next() {
        Some('?') => {
            c.at += 1;
            Ok(Outcome::Never)
        }
        Some('-') => {
            let at = *c;
            c.at += 1;
            let name = c.word(expected)?;
            let number = || {
                name.parse()
                    .ok()
                    .filter(|number| (1..=4095).contains(number))
            };
            let errno = errno_by_name(name).or_else(|| number().map(Errno));
            Ok(Outcome::Failed(errno.ok_or_else(|| at.error(expected))?))
        }
        _ => Ok(Outcome::Returned(c.number(expected)?)),
    }
}

/// A position in one line.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    text: &'a str,
    /// Byte of the whole text at which the line starts.
    start: usize,
    line: usize,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn skip_blanks(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn at_end(&mut self) -> bool {
        self.skip_blanks();
        self.rest().is_empty()
    }

    /// The thing at this position is not what was expected.
    fn error(mut self, expected: &str) -> ParseError {
        self.skip_blanks();
        let word = self.peek_word().len();
        let one = self.rest().chars().next().map_or(0, char::len_utf8);
        let len = word.max(one);
        let found = match &self.rest()[..len] {
            "" => "the end of the line".to_owned(),
            text => format!("`{text}`"),
        };
        let from = self.start + self.at;
        ParseError {
            span: from..from + len,
            line: self.line,
            column: self.text[..self.at].chars().count() + 1,
            found,
            expected: expected.to_owned(),
        }
    }

    fn peek_word(&self) -> &'a str {
        let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        let rest = self.rest();
        &rest[..rest.find(|c| !in_word(c)).unwrap_or(rest.len())]
    }

    fn word(&mut self, expected: &str) -> Result<&'a str, ParseError> {
        self.skip_blanks();
        let word = self.peek_word();
        if word.is_empty() {
            return Err(self.error(expected));
        }
        self.at += word.len();
        Ok(word)
    }

    fn expect_word(&mut self, wanted: &str, expected: &str) -> Result<(), ParseError> {
        let at = *self;
        if self.word(expected)? == wanted {
            Ok(())
        } else {
            Err(at.error(expected))
        }
    }

    fn expect(&mut self, punctuation: char) -> Result<(), ParseError> {
        self.skip_blanks();
        if !self.rest().starts_with(punctuation) {
            return Err(self.error(&format!("`{punctuation}`")));
        }
        self.at += punctuation.len_utf8();
        Ok(())
    }

    fn end(mut self) -> Result<(), ParseError> {
        if self.at_end() {
            Ok(())
        } else {
            Err(self.error("the end of the line"))
        }
    }

    fn number(&mut self, expected: &str) -> Result<u64, ParseError> {
        let at = *self;
        let word = self.word(expected)?;
        let number = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => word.parse(),
        };
        number.map_err(|_| at.error(expected))
    }

    fn signed<N: std::str::FromStr>(&mut self, expected: &str) -> Result<N, ParseError> {
        let at = *self;
        self.word(expected)?.parse().map_err(|_| at.error(expected))
    }

    /// A comma, then what `read` reads.
    fn next<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, ParseError>,
    ) -> Result<T, ParseError> {
        self.expect(',')?;
        read(self)
    }

    fn next_number(&mut self, expected: &str) -> Result<u64, ParseError> {
        self.next(|cursor| cursor.number(expected))
    }

    fn next_named(&mut self, names: &Names, what: &str) -> Result<u64, ParseError> {
        self.next(|cursor| cursor.named(names, what))
    }

    /// Names and numbers with `|` between them.
    fn named(&mut self, names: &Names, what: &str) -> Result<u64, ParseError> {
        let expected = format!("{what}: a number or names such as {}", names.examples());
        let mut value = 0;
        loop {
            let at = *self;
            let word = self.word(&expected)?;
            value |= match names.get(word) {
                Some(bits) => bits,
                None => {
                    *self = at;
                    self.number(&expected)?
                }
            };
            self.skip_blanks();
            if !self.rest().starts_with('|') {
                return Ok(value);
            }
            self.at += 1;
        }
    }

    /// A string literal.
    fn string(&mut self, expected: &str) -> Result<String, ParseError> {
        self.skip_blanks();
        let opening = *self;
        if !self.rest().starts_with('"') {
            return Err(self.error(expected));
        }
        self.at += 1;
        let mut string = String::new();
        loop {
            let at = *self;
            match self.take_char() {
                None => return Err(opening.error("a string with a closing `\"`")),
                Some('"') => return Ok(string),
                Some('\\') => {
                    let c = self.escape().ok_or_else(|| {
                        at.error("one of the escapes \\\\, \\\", \\n, \\t, \\u{…}")
                    })?;
                    string.push(c);
                }
                Some(c) => string.push(c),
            }
        }
    }

    fn take_char(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn escape(&mut self) -> Option<char> {
        match self.take_char()? {
            c @ ('"' | '\\') => Some(c),
            'n' => Some('\n'),
            't' => Some('\t'),
            'u' => {
                let digits = self.rest().strip_prefix('{')?;
                let digits = &digits[..digits.find('}')?];
                self.at += digits.len() + 2;
                char::from_u32(u32::from_str_radix(digits, 16).ok()?)
            }
            _ => None,
        }
    }
}
