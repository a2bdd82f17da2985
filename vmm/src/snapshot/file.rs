//! Snapshots as files.
//!
//! ```text
//! 0   "STALESNP"
//! 8   version              u32, little endian like all that follows
//! 12  bytes of the header  u32
//! 16  pages                u32
//! 20  SHA-256 of the first 20 bytes and of all that follows the digest
//! 52  header               postcard: whose machine it is, vCPUs, devices
//!     page numbers         u32 each, rising; the pages that are missing are zero
//!     pages                4096 bytes each
//! ```
//!
//! The sizes must add up to the file's, and the digest must be right, before anything is decoded.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use abi::layout::{MAX_CPUS, MAX_MEMORY, MIN_MEMORY, PAGE_SIZE};
use abi::point::Point;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Snapshot;
use crate::boot;
use crate::control::BoardImage;
use crate::explore::Standing;
use crate::kvm::Host;
use crate::kvm::vcpu::VcpuImage;
use crate::memory::{GuestRam, PhysMem, RamError};
use crate::scenario::{self, Scenario, ScenarioError};

const MAGIC: &[u8; 8] = b"STALESNP";
const VERSION: u32 = 1;
/// Bytes before the header: magic, three numbers, digest.
const PREFIX: usize = 52;
const DIGEST: std::ops::Range<usize> = 20..PREFIX;
/// Largest header: a vCPU takes about 12 KiB, the console at most 4 MiB.
const MAX_HEADER: u64 = 16 << 20;
/// Shorter than any scenario: `program.name="x"`.
const LEAST_SCENARIO: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;

/// A snapshot with what is needed to go on from it.
#[derive(Debug)]
pub struct SavedMachine {
    /// What runs in it.
    pub scenario: Scenario,
    /// Where each vCPU stands.
    pub standing: Vec<Standing>,
    /// The machine.
    pub snapshot: Arc<Snapshot>,
}

/// Why a snapshot file is refused, or not written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No such file, or one that cannot be read or written.
    #[error("{path}: cannot be {verb}")]
    Io {
        /// The file.
        path: PathBuf,
        /// "read" or "written".
        verb: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// There is something at its path already.
    #[error("{path}: is there already, and is not overwritten; choose another name")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Not what a snapshot looks like.
    #[error("{path}: {problem}; `stalemate snapshot` takes a new one")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Taken of other images: what the host knows of the guest would be wrong.
    #[error(
        "{path}: was taken with kernel {theirs}, this program has kernel {ours}; \
         `stalemate snapshot` takes a new one"
    )]
    OtherKernel {
        /// The file.
        path: PathBuf,
        /// The file's images.
        theirs: String,
        /// This program's.
        ours: String,
    },
    /// Taken on another CPU, whose state this one cannot have.
    #[error(
        "{path}: was taken on \"{theirs}\", this is \"{ours}\"; a snapshot holds the CPU's own state \
         (a reproducer does not: it replays on any host)"
    )]
    OtherCpu {
        /// The file.
        path: PathBuf,
        /// Its CPU.
        theirs: String,
        /// This one.
        ours: String,
    },
    /// Its scenario is not one.
    #[error("{path}: its scenario is refused")]
    Scenario {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<ScenarioError>,
    },
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] RamError),
}

#[derive(Serialize, Deserialize)]
struct Header {
    /// [`images_hash`].
    images: String,
    cpu: String,
    scenario: String,
    memory_bytes: u64,
    /// Where each vCPU stands: a point's number, and its arguments.
    standing: Vec<(Option<u64>, [u64; 2])>,
    vcpus: Vec<Arc<VcpuImage>>,
    board: BoardImage,
}

impl SavedMachine {
    /// Writes it to a new file at `path`.
    ///
    /// # Errors
    /// There is one already, or it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Io {
            path: path.into(),
            verb: "written",
            source,
        };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        file.write_all(&self.to_bytes()).map_err(failed)?;
        match file.persist_noclobber(path) {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(SnapshotError::Exists { path: path.into() })
            }
            Err(error) => Err(failed(error.error)),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let memory = &self.snapshot.memory;
        let standing = |standing: &Standing| (standing.point.map(|p| p as u64), standing.args);
        let header = postcard::to_stdvec(&Header {
            images: images_hash(),
            cpu: Host::cpu_model(),
            scenario: self.scenario.to_toml(),
            memory_bytes: memory.bytes(),
            standing: self.standing.iter().map(standing).collect(),
            vcpus: self.snapshot.vcpus.clone(),
            board: self.snapshot.board.clone(),
        })
        .expect("plain data");
        let (numbers, pages) = memory.pages_with_data();
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, header.len() as u32, numbers.len() as u32] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([0; DIGEST.end - DIGEST.start]);
        bytes.extend(header);
        bytes.extend(numbers.iter().flat_map(|page| (*page as u32).to_le_bytes()));
        bytes.extend(pages);
        let digest = digest(&bytes);
        bytes[DIGEST].copy_from_slice(&digest);
        bytes
    }

    /// True where the file at `path` can be no scenario: it begins like a snapshot or like no text, is too short, or is
    /// named like a snapshot.
    #[must_use]
    pub fn is_one(path: &Path) -> bool {
        let is_named = path.extension().is_some_and(|it| it == "snapshot") && path.is_file();
        let is_none = |start: &[u8]| start.len() < LEAST_SCENARIO || start.contains(&0);
        is_named || start_of(path).is_some_and(|start| is_none(&start)) || Self::begins(path)
    }

    /// True where the file at `path` begins like a snapshot.
    #[must_use]
    pub fn begins(path: &Path) -> bool {
        start_of(path).is_some_and(|start| start.starts_with(MAGIC))
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn read(path: &Path) -> Result<Self, SnapshotError> {
        let unreadable = |source| SnapshotError::Io {
            path: path.into(),
            verb: "read",
            source,
        };
        let most = PREFIX as u64 + MAX_HEADER + MAX_MEMORY / PAGE_SIZE * (4 + PAGE_SIZE);
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        // A device may have no end, and a FIFO no writer.
        if !metadata.is_file() {
            return Err(SnapshotError::Malformed {
                path: path.into(),
                problem: "is no regular file".into(),
            });
        }
        let length = metadata.len();
        if length > most {
            return Err(SnapshotError::Malformed {
                path: path.into(),
                problem: format!("{length} bytes are too many for a snapshot"),
            });
        }
        Self::from_bytes(path, &std::fs::read(path).map_err(unreadable)?)
    }

    fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, SnapshotError> {
        let malformed = |problem: String| SnapshotError::Malformed {
            path: path.into(),
            problem,
        };
        let (header, pages) = checked(bytes).map_err(malformed)?;
        let header: Header = postcard::from_bytes(header)
            .map_err(|error| malformed(format!("its header cannot be decoded: {error}")))?;
        let ours = images_hash();
        if header.images != ours {
            return Err(SnapshotError::OtherKernel {
                path: path.into(),
                theirs: header.images,
                ours,
            });
        }
        let ours = Host::cpu_model();
        if header.cpu != ours {
            return Err(SnapshotError::OtherCpu {
                path: path.into(),
                theirs: header.cpu,
                ours,
            });
        }
        let scenario =
            scenario::parse(path, &header.scenario).map_err(|source| SnapshotError::Scenario {
                path: path.into(),
                source: Box::new(source),
            })?;
        let vcpus = header.vcpus.len();
        if vcpus == 0 || vcpus > MAX_CPUS || scenario.vcpus as usize != vcpus {
            return Err(malformed(format!("it has {vcpus} vCPUs")));
        }
        if header.standing.len() != vcpus {
            return Err(malformed("not every vCPU stands somewhere".into()));
        }
        let standing = header.standing.iter().map(|(point, args)| {
            let point = point.map(|id| {
                Point::from_id(id)
                    .ok_or_else(|| format!("a vCPU stands at point {id}, which is none"))
            });
            let point = point.transpose()?;
            Ok(Standing { point, args: *args })
        });
        let standing = standing.collect::<Result<_, _>>().map_err(malformed)?;
        if header.memory_bytes != scenario.memory_bytes {
            return Err(malformed(format!(
                "it has {} bytes of memory, its scenario {}",
                header.memory_bytes, scenario.memory_bytes
            )));
        }
        let memory = GuestRam::new(header.memory_bytes)?;
        for (number, page) in pages {
            memory
                .write(u64::from(number) * PAGE_SIZE, page)
                .map_err(|error| malformed(error.to_string()))?;
        }
        memory.take_written();
        Ok(Self {
            scenario,
            standing,
            snapshot: Arc::new(Snapshot {
                memory,
                vcpus: header.vcpus,
                board: header.board,
            }),
        })
    }
}

/// What the file at `path` begins with, where it can be read. Nothing is waited for: it may be a FIFO.
fn start_of(path: &Path) -> Option<Vec<u8>> {
    let is_file = std::fs::metadata(path).is_ok_and(|data| data.is_file());
    let file = is_file.then(|| std::fs::File::open(path).ok()).flatten()?;
    let mut start = Vec::new();
    file.take(PREFIX as u64).read_to_end(&mut start).ok()?;
    Some(start)
}

/// Pages with their numbers.
type Pages<'a> = Vec<(u32, &'a [u8])>;

/// The header and the numbered pages of a file whose sizes and digest are right.
fn checked(bytes: &[u8]) -> Result<(&[u8], Pages<'_>), String> {
    let len = bytes.len();
    if len < LEAST_SCENARIO {
        return Err(format!(
            "{len} bytes are too few for a snapshot or a scenario"
        ));
    }
    if !bytes.starts_with(MAGIC) {
        return Err("is no snapshot, which begins with STALESNP".into());
    }
    if len < PREFIX {
        return Err(format!(
            "is cut off: {len} bytes are too few for a snapshot"
        ));
    }
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let [version, header, pages] = [8, 12, 16].map(number);
    if version != VERSION {
        return Err(format!(
            "has version {version}; this program reads version {VERSION}"
        ));
    }
    if u64::from(header) > MAX_HEADER || u64::from(pages) > MAX_MEMORY / PAGE_SIZE {
        return Err(format!(
            "a header of {header} bytes and {pages} pages are too many"
        ));
    }
    let (header, pages) = (header as usize, pages as usize);
    let wanted = PREFIX + header + pages * (4 + PAGE);
    if len != wanted {
        return Err(format!("has {len} bytes where its sizes make {wanted}"));
    }
    if bytes[DIGEST] != digest(bytes) {
        return Err("is damaged: its checksum is wrong".into());
    }
    let (header, rest) = bytes[PREFIX..].split_at(header);
    let (numbers, data) = rest.split_at(4 * pages);
    let pages = numbers.chunks_exact(4).zip(data.chunks_exact(PAGE));
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
    Ok((header, pages.map(|(n, page)| (number(n), page)).collect()))
}

fn digest(file: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&file[..DIGEST.start]);
    hash.update(&file[DIGEST.end..]);
    hash.finalize().into()
}

/// Makes the digest of a file right that was changed.
#[cfg(test)]
pub(crate) fn seal(file: &mut [u8]) {
    let digest = digest(file);
    file[DIGEST].copy_from_slice(&digest);
}

/// Bytes of the header of a file.
#[cfg(test)]
pub(crate) fn header(file: &[u8]) -> std::ops::Range<usize> {
    let length = u32::from_le_bytes(file[12..16].try_into().expect("4 bytes"));
    PREFIX..PREFIX + length as usize
}

/// Names the two images in this program: a snapshot holds their code and what points into it.
fn images_hash() -> String {
    let mut hash = Sha256::new();
    hash.update(
        boot::KernelImage::Embedded
            .bytes()
            .expect("it is in this program"),
    );
    hash.update(boot::user_image());
    hash.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

// A page's number fits into 32 bits, and the least memory is whole pages.
const _: () =
    assert!(MAX_MEMORY / PAGE_SIZE <= u32::MAX as u64 && MIN_MEMORY.is_multiple_of(PAGE_SIZE));

#[cfg(test)]
mod tests;
