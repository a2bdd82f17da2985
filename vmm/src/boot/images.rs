//! The two images that are booted: those built into this binary, or another kernel from a file.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

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

static EMBEDDED_KERNEL: &[u8] = include_bytes!(env!("STALEMATE_KERNEL_ELF"));
static EMBEDDED_USER: &[u8] = include_bytes!(env!("STALEMATE_USER_ELF"));

fn read(path: &Path) -> Result<Vec<u8>, KernelImageError> {
    std::fs::read(path).map_err(|source| KernelImageError {
        path: path.to_owned(),
        source,
    })
}
