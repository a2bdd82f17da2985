//! Reads the text of a scenario or a trace.

use std::io;
use std::path::Path;

/// The text of the file at `path`.
///
/// # Errors
/// The file system refused, it is no regular file (a device may have no end, and a FIFO no writer),
/// or it is not UTF-8.
pub(super) fn read(path: &Path) -> io::Result<String> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    String::from_utf8(std::fs::read(path)?).map_err(|error| {
        let (good, rest) = error.as_bytes().split_at(error.utf8_error().valid_up_to());
        let good = String::from_utf8_lossy(good);
        let line = good.matches('\n').count() + 1;
        let column = good.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        let byte = rest.first().copied().unwrap_or_default();
        let problem = format!("line {line}, column {column}: byte {byte:#04x} is not UTF-8");
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path(), Path::new("/dev/zero")] {
            let error = read(path).unwrap_err().to_string();
            assert_eq!(error, "it is not a regular file");
        }
        let file = directory.path().join("f");
        std::fs::write(&file, b"a = 1\n\xc2\xb5 = \xff\n").unwrap();
        assert_eq!(
            read(&file).unwrap_err().to_string(),
            "line 2, column 5: byte 0xff is not UTF-8"
        );
        std::fs::write(&file, "µ\n").unwrap();
        assert_eq!(read(&file).unwrap(), "µ\n");
    }
}
