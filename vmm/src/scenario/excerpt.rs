//! The few lines of a text that an error shows. A line may be as long as its author likes; what is
//! printed of it may not: the renderer pads with a `fmt` width, which is 16 bits wide.

use std::ops::Range;

use miette::{MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents};

/// Characters that are shown of one line.
const SHOWN: usize = 200;
/// Of these, at most this many come before the place that is meant.
const BEFORE: usize = 60;
/// Characters of a message that are kept at either end.
const KEPT: usize = 200;

/// A line of a text and its neighbours, each cut to a readable length.
#[derive(Debug)]
pub(super) struct Excerpt {
    name: String,
    text: String,
    /// Number of the first line of `text` in the whole, from 0.
    first_line: usize,
    /// The column of the place in its line of the whole, in characters from 0.
    column: usize,
}

impl Excerpt {
    /// What to show of `text` for the place `span`, and where that place is in it. Of a place of
    /// several lines, the first is shown.
    pub(super) fn new(name: String, text: &str, span: Range<usize>) -> (Self, SourceSpan) {
        let start = text[..span.start].rfind('\n').map_or(0, |at| at + 1);
        let end = text[span.start..]
            .find('\n')
            .map_or(text.len(), |at| span.start + at);
        let number = text[..start].matches('\n').count();
        let (line, place) = window(
            &text[start..end],
            span.start - start..span.end.clamp(span.start, end) - start,
        );
        let before = text[..start]
            .strip_suffix('\n')
            .map(|text| window(text.rsplit('\n').next().unwrap_or(""), 0..0).0 + "\n")
            .unwrap_or_default();
        let after = text[end..]
            .strip_prefix('\n')
            .and_then(|text| text.split('\n').next())
            .map(|line| "\n".to_owned() + &window(line, 0..0).0)
            .unwrap_or_default();
        let excerpt = Self {
            name,
            first_line: number - usize::from(!before.is_empty()),
            column: text[start..span.start].chars().count(),
            text: format!("{before}{line}{after}"),
        };
        let at = before.len() + place.start;
        (excerpt, (at..at + place.len()).into())
    }
}

impl SourceCode for Excerpt {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let read = self.text.read_span(span, lines_before, lines_after)?;
        // With lines before it, what is read starts at the start of a line.
        let column = if lines_before == 0 { self.column } else { 0 };
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.clone(),
            read.data(),
            *read.span(),
            self.first_line + read.line(),
            column,
            read.line_count(),
        )))
    }
}

/// The part of `line` around `place`, and the place in it.
fn window(line: &str, place: Range<usize>) -> (String, Range<usize>) {
    let mut from = 0;
    if line.chars().count() > SHOWN {
        let before = line[..place.start].char_indices();
        from = before.rev().nth(BEFORE - 1).map_or(0, |(at, _)| at);
    }
    let to = line[from..]
        .char_indices()
        .nth(SHOWN)
        .map_or(line.len(), |(at, _)| from + at);
    let head = if from > 0 { "…" } else { "" };
    let tail = if to < line.len() { "…" } else { "" };
    // A control character would steer the terminal, and a lone CR would count as a line.
    let shown = line[from..to].replace(|c: char| c.is_ascii_control() && c != '\t', " ");
    let start = head.len() + place.start - from;
    let end = head.len() + place.end.min(to) - from;
    (format!("{head}{shown}{tail}"), start..end.max(start))
}

/// `text` without its middle where it is too long to be read.
pub(super) fn abridged(text: String) -> String {
    if text.chars().count() <= 2 * KEPT {
        return text;
    }
    let start: String = text.chars().take(KEPT).collect();
    let end = text
        .char_indices()
        .rev()
        .nth(KEPT - 1)
        .map_or(0, |(at, _)| at);
    format!("{start}…{}", &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_kept_and_the_rest_is_cut() {
        let long = "µ".repeat(70_000);
        let text = format!("{long}\n{long}x=1{long}\n{long}\nlast");
        let at = text.find('x').unwrap();
        let (excerpt, span) = Excerpt::new("f".into(), &text, at..at + 3);
        assert_eq!(
            &excerpt.text[span.offset()..span.offset() + span.len()],
            "x=1"
        );
        assert!(excerpt.text.chars().count() < 3 * (SHOWN + 3));
        let read = excerpt.read_span(&span, 0, 0).unwrap();
        assert_eq!((read.line(), read.column()), (1, 70_000));
        assert_eq!(excerpt.read_span(&span, 1, 1).unwrap().line(), 0);
    }

    #[test]
    fn a_short_message_is_kept_whole() {
        assert_eq!(abridged("short".into()), "short");
        let long = abridged(format!("a{}z", "µ".repeat(70_000)));
        assert!(long.starts_with("aµ") && long.ends_with("µz"));
        assert_eq!(long.chars().count(), 2 * KEPT + 1);
    }

    proptest::proptest! {
        #[test]
        fn every_place_can_be_read(text in "[a\nµ\r\t]{0,400}", from in 0..900_usize, len in 0..300_usize) {
            let floor = |mut at: usize| { at = at.min(text.len()); while !text.is_char_boundary(at) { at -= 1; } at };
            let (from, to) = (floor(from), floor(from + len));
            let (excerpt, span) = Excerpt::new("f".into(), &text, from..to);
            let read = excerpt.read_span(&span, 0, 0).unwrap();
            assert_eq!(read.line(), text[..from].matches('\n').count());
        }
    }
}
