//! Why a scenario is refused: always with the place in the text, where there is one.

use std::ops::Range;
use std::path::{Path, PathBuf};

use miette::{Diagnostic, SourceSpan};

use super::excerpt::{Excerpt, abridged};
use super::values::Refused;

/// Why a scenario cannot be used.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum ScenarioError {
    /// Neither a file nor a name in `scenarios/`.
    #[error("no scenario '{}'", name.display().to_string().escape_debug())]
    #[diagnostic(help("{help}"))]
    NotFound {
        /// What was given.
        name: PathBuf,
        /// What there is.
        help: String,
    },
    /// The file system refused.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is refused.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Invalid(Box<Located>),
}

/// A refusal with the place that it is about.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{file}:{line}:{column}: {problem}")]
pub struct Located {
    file: String,
    line: usize,
    column: usize,
    problem: String,
    #[source_code]
    excerpt: Excerpt,
    #[label("{label}")]
    span: SourceSpan,
    label: String,
    #[help]
    help: Option<String>,
}

impl Located {
    /// Puts `refused` at `span` (bytes) of `text`, which is the content of `file`.
    pub(crate) fn new(
        file: &Path,
        text: &str,
        span: Range<usize>,
        label: &str,
        refused: Refused,
    ) -> Self {
        let start = floor_char_boundary(text, span.start);
        let end = floor_char_boundary(text, span.end).max(start);
        let before = &text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let file = file.display().to_string();
        let (excerpt, span) = Excerpt::new(file.clone(), text, start..end);
        Self {
            line: before.matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            problem: abridged(refused.problem),
            excerpt,
            file,
            span,
            label: label.to_owned(),
            help: refused.help.map(abridged),
        }
    }
}

impl From<Located> for ScenarioError {
    fn from(located: Located) -> Self {
        Self::Invalid(Box::new(located))
    }
}

/// A parser's span may end inside a character of a text that is not what it expected.
fn floor_char_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_count_from_one_and_in_characters() {
        let text = "a\nµ = x\n";
        let at = text.find('x').unwrap();
        let located = Located::new(Path::new("f"), text, at..at + 1, "", Refused::new("no"));
        assert_eq!(located.to_string(), "f:2:5: no");
        let inside = Located::new(Path::new("f"), text, 3..4, "", Refused::new("no"));
        assert_eq!(inside.to_string(), "f:2:1: no");
        let beyond = Located::new(Path::new("f"), text, 99..100, "", Refused::new("no"));
        assert_eq!(beyond.to_string(), "f:3:1: no");
    }
}
