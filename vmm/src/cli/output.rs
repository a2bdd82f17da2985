//! Where text and JSON go. The only module that writes to the terminal.

use std::cell::OnceCell;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::{Json, Talk};
use super::exit::Exit;
use super::failure::Failure;
use crate::report::json;
use crate::report::verdict::{Detail, Paint};

/// The command's way to speak.
#[derive(Debug)]
pub(super) struct Output {
    json: Option<PathBuf>,
    /// Why stdout is incomplete, where it is.
    lost: OnceCell<io::Error>,
    /// How much is said.
    pub(super) detail: Detail,
    /// Whether the text is coloured.
    pub(super) paint: Paint,
}

impl Output {
    /// The output that the options ask for.
    #[must_use]
    pub(super) fn new(json: &Json, talk: Talk) -> Self {
        let mut output = Self {
            json: json.json.clone(),
            lost: OnceCell::new(),
            detail: match talk {
                Talk { quiet: true, .. } => Detail::Headline,
                Talk { verbose: true, .. } => Detail::Full,
                _ => Detail::Normal,
            },
            paint: Paint::Plain,
        };
        let is_terminal = if output.json_on_stdout() {
            io::stderr().is_terminal()
        } else {
            io::stdout().is_terminal()
        };
        output.paint = paint(is_terminal);
        output
    }

    /// Text for a person: to stdout, or to stderr where stdout carries JSON.
    pub(super) fn say(&self, text: &str) {
        if self.json_on_stdout() {
            complain(text);
        } else {
            self.print(text);
        }
    }

    /// The machine-readable result, where one was asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn json(&self, result: &impl Serialize) -> Result<(), Failure> {
        match &self.json {
            None => {}
            Some(path) if path == Path::new("-") => {
                self.print(&json::to_text(result));
            }
            Some(path) => json::write(path, &json::to_text(result))?,
        }
        Ok(())
    }

    /// Checks, before a run, that its JSON can be written after it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn check_json(&self) -> Result<(), Failure> {
        match &self.json {
            Some(path) if path != Path::new("-") => Ok(json::probe(path)?),
            _ => Ok(()),
        }
    }

    /// True where progress may be drawn: on a terminal, and not asked to be quiet.
    #[must_use]
    pub(super) fn shows_progress(&self) -> bool {
        self.detail != Detail::Headline && io::stderr().is_terminal()
    }

    /// Ends the output; `exit` is what the command came to.
    ///
    /// # Errors
    /// Something that was to go to stdout was lost.
    pub(super) fn finish(self, exit: Exit) -> Result<Exit, Failure> {
        match self.lost.into_inner() {
            None => Ok(exit),
            Some(source) => Err(Failure::Stdout(source)),
        }
    }

    fn print(&self, text: &str) {
        if let Err(error) = write_stdout(text) {
            // The first failure is the cause of the others.
            let _ = self.lost.set(error);
        }
    }

    /// True where stdout is for the JSON alone.
    #[must_use]
    pub(super) fn json_on_stdout(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }
}

/// Writes to stderr: errors and warnings.
pub(super) fn complain(text: &str) {
    // There is nowhere left to say that this failed.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Writes why a command, or a part of it, has come to nothing.
pub(super) fn report(failure: &Failure) {
    complain(&failure.render(paint(io::stderr().is_terminal())));
}

/// Writes to stdout. A reader that is gone (`stalemate list points | head`) is no error of ours.
///
/// # Errors
/// What was written is lost: a full disk, for one.
pub(super) fn write_stdout(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Refuses two options that name one file, however they spell it.
pub(super) fn apart([one, two]: [(&str, Option<&Path>); 2]) -> Result<(), Failure> {
    // The file may not be there yet, its directory is.
    let place = |path: &Path| {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(
            path.canonicalize()
                .unwrap_or(parent.join(path.file_name()?)),
        )
    };
    match (one.1.and_then(place), two.1.and_then(place)) {
        (Some(first), Some(second)) if first == second => Err(Failure::Usage {
            problem: format!("{} and {} name one file", one.0, two.0),
            help: "give each its own".into(),
        }),
        _ => Ok(()),
    }
}

/// `path` as a word of a command that a person may paste into a shell.
#[must_use]
pub(super) fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    // Only NUL has no form, and no path has one.
    shlex::try_quote(&text).map_or(text.clone(), Into::into)
}

/// Whether a stream may be coloured (<https://no-color.org>).
#[must_use]
pub(super) fn paint(is_terminal: bool) -> Paint {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    if is_terminal && !no_colour && !dumb {
        Paint::Colour
    } else {
        Paint::Plain
    }
}
