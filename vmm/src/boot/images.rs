//! The two images that are booted: those built into this binary, or another kernel from a file.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Largest kernel file that is read; ours has a few megabytes, debug information included.
const MAX_BYTES: u64 = 256 << 20;

/// A kernel's ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelImage {
    /// The one that was built with this binary.
    Embedded,
    /// Another one.
    File(PathBuf),
    /// Another one, in memory.
    Bytes(Vec<u8>),
}

/// A kernel file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the kernel image {}", .path.display())]
pub struct KernelImageError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl KernelImage {
    /// The bytes of the ELF file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn bytes(&self) -> Result<Cow<'static, [u8]>, KernelImageError> {
        match self {
            Self::Embedded => Ok(Cow::Borrowed(EMBEDDED_KERNEL)),
            Self::File(path) => read(path).map(Cow::Owned),
            Self::Bytes(bytes) => Ok(Cow::Owned(bytes.clone())),
        }
    }
}

/// The ELF file of the user programs that was built with this binary.
#[must_use]
pub fn user_image() -> &'static [u8] {
    EMBEDDED_USER
}

/// Names the kernel and the programs that this program was built with: a hash of their sources.
#[must_use]
pub fn kernel_hash() -> &'static str {
    env!("STALEMATE_KERNEL_HASH")
}

/// The flags that the embedded kernel was compiled with, as `CARGO_ENCODED_RUSTFLAGS` takes them: whoever
/// builds another kernel to compare with it needs the same.
#[must_use]
pub fn kernel_rustflags() -> &'static str {
    env!("STALEMATE_KERNEL_RUSTFLAGS")
}

static EMBEDDED_KERNEL: &[u8] = include_bytes!(env!("STALEMATE_KERNEL_ELF"));
static EMBEDDED_USER: &[u8] = include_bytes!(env!("STALEMATE_USER_ELF"));

fn read(path: &Path) -> Result<Vec<u8>, KernelImageError> {
    read_regular(path).map_err(|source| KernelImageError {
        path: path.to_owned(),
        source,
    })
}

/// A device may have no end, and a FIFO no writer.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if metadata.len() > MAX_BYTES {
        return Err(io::Error::other(format!(
            "it is larger than {} MiB: give the kernel's ELF file",
            MAX_BYTES >> 20
        )));
    }
    let mut bytes = Vec::new();
    // It may have grown since; a file cut short is no ELF file.
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    fn refusal(path: &Path) -> String {
        let error = KernelImage::File(path.to_owned()).bytes().unwrap_err();
        error.source().unwrap().to_string()
    }

    #[test]
    fn what_has_no_end_is_not_read() {
        for path in ["/dev/zero", "/"] {
            assert_eq!(refusal(Path::new(path)), "it is not a regular file");
        }
        let huge = tempfile::NamedTempFile::new().unwrap();
        huge.as_file().set_len(MAX_BYTES + 1).unwrap();
        assert!(refusal(huge.path()).contains("larger than 256 MiB"));
    }
}
