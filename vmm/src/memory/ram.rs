//! The machine's memory: one memfd from guest physical address 0 without holes, mapped shared, or
//! privately where it is a copy-on-write copy of another machine's.
#![allow(unsafe_code, reason = "guest memory as atomics, holes of a file")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{ENTRIES_PER_TABLE, MAX_MEMORY, MIN_MEMORY, PAGE_SIZE};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{OutOfRange, PhysMem};

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Below [`MIN_MEMORY`].
    #[error("{given} bytes of guest memory are too few: the least is {minimum} ({} MiB)", minimum >> 20)]
    TooSmall {
        /// Bytes asked for.
        given: u64,
        /// Bytes needed.
        minimum: u64,
    },
    /// Above [`MAX_MEMORY`], where the local APIC's hole begins.
    #[error("{given} bytes of guest memory are too many: the most is {maximum} ({} MiB)", maximum >> 20)]
    TooLarge {
        /// Bytes asked for.
        given: u64,
        /// Bytes possible.
        maximum: u64,
    },
    /// Not a whole number of frames.
    #[error("{given} bytes of guest memory are not a multiple of {PAGE_SIZE}")]
    NotWholeFrames {
        /// Bytes asked for.
        given: u64,
    },
    /// The host refused the memory.
    #[error("cannot {step} {bytes} bytes of guest memory")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// Guest memory. Clones share it.
///
/// ```
/// use vmm::memory::{GuestRam, PhysMem};
///
/// let ram = GuestRam::new(16 << 20).unwrap();
/// ram.write(0x2000, b"frame").unwrap();
/// let mut bytes = [0; 5];
/// ram.read(0x2000, &mut bytes).unwrap();
/// assert_eq!(&bytes, b"frame");
/// ```
#[derive(Clone, Debug)]
pub struct GuestRam {
    region: Arc<GuestRegionMmap>,
    /// Pages that the host has written, which no dirty log of KVM's shows; a bit each.
    written: Arc<[AtomicU64]>,
}

/// How a memfd is mapped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mapping {
    Shared,
    CopyOnWrite,
}

impl GuestRam {
    /// `bytes` of zeroes.
    ///
    /// # Errors
    /// A size that the machine cannot have, or that the host does not give.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        if bytes < MIN_MEMORY {
            return Err(RamError::TooSmall {
                given: bytes,
                minimum: MIN_MEMORY,
            });
        }
        if bytes > MAX_MEMORY {
            return Err(RamError::TooLarge {
                given: bytes,
                maximum: MAX_MEMORY,
            });
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::NotWholeFrames { given: bytes });
        }
        let host = |step| {
            move |source| RamError::Host {
                step,
                bytes,
                source,
            }
        };
        let file = memfd().map_err(host("create a memfd for"))?;
        file.set_len(bytes).map_err(host("reserve"))?;
        Self::map(file, bytes, Mapping::Shared)
    }

    fn map(file: File, bytes: u64, mapping: Mapping) -> Result<Self, RamError> {
        let flags = libc::MAP_NORESERVE
            | match mapping {
                Mapping::Shared => libc::MAP_SHARED,
                Mapping::CopyOnWrite => libc::MAP_PRIVATE,
            };
        let file = Some(FileOffset::new(file, 0));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let refused = |source| RamError::Host {
            step: "map",
            bytes,
            source,
        };
        let region = MmapRegion::build(file, bytes as usize, access, flags)
            .map_err(|error| refused(io::Error::other(error)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .ok_or_else(|| refused(io::Error::other("it ends beyond the address space")))?;
        let words = (bytes / PAGE_SIZE).div_ceil(64);
        Ok(Self {
            region: Arc::new(region),
            written: (0..words).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// A copy of what is here now. Nobody may write meanwhile.
    ///
    /// # Errors
    /// The host does not give the memory.
    pub fn copy(&self) -> Result<Self, RamError> {
        let copy = Self::new(self.bytes())?;
        let (numbers, pages) = self.pages_with_data();
        for (number, page) in numbers.iter().zip(pages.chunks_exact(PAGE_SIZE as usize)) {
            copy.write(number * PAGE_SIZE, page)
                .expect("memories of one size");
        }
        copy.take_written();
        Ok(copy)
    }

    /// Memory that is this one until either is written; neither sees what is written to the other
    /// through a copy. This one must not be written any more.
    ///
    /// # Errors
    /// The host does not give the memory.
    pub fn copy_on_write(&self) -> Result<Self, RamError> {
        let bytes = self.bytes();
        let host = |source| RamError::Host {
            step: "share",
            bytes,
            source,
        };
        Self::map(
            self.file().try_clone().map_err(host)?,
            bytes,
            Mapping::CopyOnWrite,
        )
    }

    /// Numbers of the pages that are not zero, and these pages one after the other.
    pub(crate) fn pages_with_data(&self) -> (Vec<u64>, Vec<u8>) {
        let (mut numbers, mut pages) = (Vec::new(), Vec::new());
        let mut page = [0; PAGE_SIZE as usize];
        let mut gpa = 0;
        while let Some(data) = self.data_from(gpa) {
            self.read(data, &mut page).expect("a page of this memory");
            if page != [0; PAGE_SIZE as usize] {
                numbers.push(data / PAGE_SIZE);
                pages.extend(page);
            }
            gpa = data + PAGE_SIZE;
        }
        (numbers, pages)
    }

    /// GPA of the first page from `gpa` that may hold something: what the file has no page for is zero,
    /// unless this is a private copy.
    fn data_from(&self, gpa: u64) -> Option<u64> {
        if gpa >= self.bytes() {
            return None;
        }
        if self.region.flags() & libc::MAP_PRIVATE != 0 {
            return Some(gpa);
        }
        // SAFETY: the call moves the file's offset, which nobody uses, and touches no memory.
        let data = unsafe { libc::lseek(self.file().as_raw_fd(), gpa as i64, libc::SEEK_DATA) };
        match u64::try_from(data) {
            Ok(data) => Some(data / PAGE_SIZE * PAGE_SIZE),
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => None,
            // A file system that cannot tell: every page may.
            Err(_) => Some(gpa),
        }
    }

    /// Makes page `page` what it is in `image`, of the same size; this does not count as
    /// [written](Self::write).
    ///
    /// # Panics
    /// Where there is no such page.
    pub(crate) fn copy_page(&self, image: &Self, page: u64) {
        let at = MemoryRegionAddress(page * PAGE_SIZE);
        let bytes = PAGE_SIZE as usize;
        match (
            image.region.get_slice(at, bytes),
            self.region.get_slice(at, bytes),
        ) {
            (Ok(from), Ok(to)) => from.copy_to_volatile_slice(to),
            _ => panic!("page {page} is none of this memory"),
        }
    }

    /// Makes page `page` what `bytes` are; this does not count as [written](Self::write).
    ///
    /// # Panics
    /// Where there is no such page.
    pub(crate) fn put_page(&self, page: u64, bytes: &[u8; PAGE_SIZE as usize]) {
        let at = MemoryRegionAddress(page * PAGE_SIZE);
        let put = self.region.write_slice(bytes, at);
        assert!(put.is_ok(), "page {page} is none of this memory");
    }

    /// True where page `page` is what it is in `image`, of the same size.
    ///
    /// # Panics
    /// Where there is no such page.
    pub(crate) fn has_same_page(&self, image: &Self, page: u64) -> bool {
        let (one, two) = (image.page(page), self.page(page));
        one.iter()
            .zip(two)
            .all(|(one, two)| one.load(Relaxed) == two.load(Relaxed))
    }

    fn page(&self, page: u64) -> &[AtomicU64; ENTRIES_PER_TABLE] {
        self.table(page * PAGE_SIZE).expect("a page of this memory")
    }

    /// Numbers of the pages that the host has [written](Self::write) since the last call.
    pub fn take_written(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (word, bits) in self.written.iter().enumerate() {
            if bits.load(Relaxed) != 0 {
                pages_of(word, bits.swap(0, Relaxed), &mut pages);
            }
        }
        pages
    }

    /// Copies `data` to `gpa`.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte lies outside; nothing is written then.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), OutOfRange> {
        self.check(gpa, data.len() as u64)?;
        let end = gpa + data.len() as u64;
        for page in gpa / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
            self.written[page as usize / 64].fetch_or(1 << (page % 64), Relaxed);
        }
        self.region
            .write_slice(data, MemoryRegionAddress(gpa))
            .map_err(|_| out_of_range(gpa, data.len()))
    }

    /// Writes `value` to `gpa`.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn write_value<T: IntoBytes + Immutable>(
        &self,
        gpa: u64,
        value: &T,
    ) -> Result<(), OutOfRange> {
        self.write(gpa, value.as_bytes())
    }

    /// Reads a `T` from `gpa`, which need not be aligned.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn read_value<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T, OutOfRange> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// The memfd behind it.
    ///
    /// # Panics
    /// Never: guest memory is always file-backed.
    #[must_use]
    pub fn file(&self) -> &File {
        self.region.file_offset().expect("made from a memfd").file()
    }

    /// The same memory for libraries that take vm-memory's own type.
    #[must_use]
    pub fn backend(&self) -> GuestMemoryMmap {
        GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&self.region)])
            .expect("one region overlaps with none")
    }

    /// HVA of guest physical address 0, for the memory slot. Whoever registers it with KVM keeps a
    /// clone of this value for as long.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    fn check(&self, gpa: u64, len: u64) -> Result<(), OutOfRange> {
        match gpa.checked_add(len) {
            Some(end) if end <= self.bytes() => Ok(()),
            _ => Err(OutOfRange { gpa, len }),
        }
    }
}

impl PhysMem for GuestRam {
    fn bytes(&self) -> u64 {
        self.region.len()
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange> {
        self.check(gpa, buf.len() as u64)?;
        self.region
            .read_slice(buf, MemoryRegionAddress(gpa))
            .map_err(|_| out_of_range(gpa, buf.len()))
    }

    fn table(&self, gpa: u64) -> Result<&[AtomicU64; ENTRIES_PER_TABLE], OutOfRange> {
        let error = OutOfRange {
            gpa,
            len: PAGE_SIZE,
        };
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(error);
        }
        self.check(gpa, PAGE_SIZE)?;
        // SAFETY: the page lies inside the mapping (checked above), which lives as long as
        // `self.region`, which `&self` borrows, and is page aligned because the mapping and `gpa` are.
        // Every bit pattern is a valid `AtomicU64`, and the guest accesses it like another thread.
        Ok(unsafe { &*self.region.as_ptr().add(gpa as usize).cast() })
    }

    fn words(&self) -> &[AtomicU64] {
        let words = self.bytes() as usize / size_of::<AtomicU64>();
        // SAFETY: as in `table`: all of the mapping, which begins and ends with a page.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().cast(), words) }
    }
}

/// Appends the pages whose bits are set in word `word` of a bitmap.
pub(crate) fn pages_of(word: usize, mut bits: u64, pages: &mut Vec<u64>) {
    while bits != 0 {
        pages.push(word as u64 * 64 + u64::from(bits.trailing_zeros()));
        bits &= bits - 1;
    }
}

fn out_of_range(gpa: u64, len: usize) -> OutOfRange {
    OutOfRange {
        gpa,
        len: len as u64,
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is NUL-terminated and the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"stalemate-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_checked_and_the_minimum_is_named() {
        let error = GuestRam::new(1 << 20).unwrap_err();
        assert!(error.to_string().contains("16777216 (16 MiB)"), "{error}");
        assert!(matches!(
            GuestRam::new(MAX_MEMORY + PAGE_SIZE),
            Err(RamError::TooLarge { .. })
        ));
        assert!(matches!(
            GuestRam::new(MIN_MEMORY + 1),
            Err(RamError::NotWholeFrames { .. })
        ));
        assert_eq!(GuestRam::new(MIN_MEMORY).unwrap().bytes(), MIN_MEMORY);
    }

    #[test]
    fn a_table_is_the_page_itself() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        ram.write_value(0x3008, &0x1234_u64).unwrap();
        assert_eq!(ram.table(0x3000).unwrap()[1].load(Relaxed), 0x1234);
        ram.table(0x3000).unwrap()[2].store(7, Relaxed);
        assert_eq!(ram.read_value::<u64>(0x3010), Ok(7));
        assert!(ram.table(0x3008).is_err());
        assert!(ram.table(MIN_MEMORY).is_err());
    }

    #[test]
    fn a_copy_is_what_was_there_and_no_more() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        ram.write(0x5000, b"before").unwrap();
        ram.write(MIN_MEMORY - 2, b"..").unwrap();
        assert_eq!(ram.take_written(), [5, MIN_MEMORY / PAGE_SIZE - 1]);
        assert!(ram.take_written().is_empty());
        let copy = ram.copy().unwrap();
        ram.write(0x5000, b"after.").unwrap();
        let mut bytes = [0; 6];
        copy.read(0x5000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"before");
        copy.read(MIN_MEMORY - 6, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0\0\0\0..");
        assert!(copy.take_written().is_empty());
    }

    #[test]
    fn copies_on_write_share_what_nobody_wrote() {
        let image = GuestRam::new(MIN_MEMORY).unwrap();
        image.write(0x5000, b"image").unwrap();
        let [one, two] = [0, 1].map(|_| image.copy_on_write().unwrap());
        one.write(0x5000, b"first").unwrap();
        let read = |ram: &GuestRam| {
            let mut bytes = [0; 5];
            ram.read(0x5000, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(
            [read(&image), read(&one), read(&two)],
            [*b"image", *b"first", *b"image"]
        );
        assert_eq!(read(&one.copy().unwrap()), *b"first");
    }

    #[test]
    fn clones_and_the_memfd_share_the_bytes() {
        use std::os::unix::fs::FileExt;
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        ram.clone().write(0x5000, b"shared").unwrap();
        let mut bytes = [0; 6];
        ram.file().read_exact_at(&mut bytes, 0x5000).unwrap();
        assert_eq!(&bytes, b"shared");
    }

    proptest! {
        #[test]
        fn every_access_is_inside_or_refused(
            gpa in prop_oneof![any::<u64>(), MIN_MEMORY - 64..MIN_MEMORY + 64],
            len in 0usize..80,
        ) {
            let ram = GuestRam::new(MIN_MEMORY).unwrap();
            let inside = gpa.checked_add(len as u64).is_some_and(|end| end <= MIN_MEMORY);
            let mut buf = vec![0; len];
            prop_assert_eq!(ram.read(gpa, &mut buf).is_ok(), inside);
            prop_assert_eq!(ram.write(gpa, &buf).is_ok(), inside);
        }
    }
}
