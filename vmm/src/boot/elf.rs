//! Statically linked x86-64 ELF executables, as the two images are.

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

/// Why a file is not an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// No 64-bit little-endian ELF header.
    #[error("not a 64-bit ELF file: {0}")]
    NotElf(String),
    /// For another architecture.
    #[error("an ELF file for machine {found}, not for x86-64 (machine 62)")]
    WrongMachine {
        /// `e_machine`.
        found: u16,
    },
    /// Relocatable, shared or position independent.
    #[error(
        "an ELF file of type {found}, not a static executable (type 2): link it with -static and without -pie"
    )]
    NotExecutable {
        /// `e_type`.
        found: u16,
    },
    /// A table or a segment points outside the file, or a segment is larger in the file than in memory.
    #[error("a damaged ELF file: {0}")]
    Damaged(String),
    /// Nothing to load.
    #[error("an ELF file without a loadable segment")]
    Empty,
    /// A segment lies where this image must not be.
    #[error("linked at {found:#x}..{found_end:#x}, but it must lie in {least:#x}..{most:#x}")]
    WrongAddress {
        /// First address of the segment.
        found: u64,
        /// First address past it.
        found_end: u64,
        /// First address allowed.
        least: u64,
        /// First address past those allowed.
        most: u64,
    },
    /// A kernel segment whose physical address is not where the machine's page tables expect it.
    #[error(
        "the segment at {address:#x} has physical address {found:#x}, not {expected:#x}: link it with guest-kernel/image.ld"
    )]
    WrongPhysical {
        /// Its address.
        address: u64,
        /// Its physical address.
        found: u64,
        /// What the physical address must be.
        expected: u64,
    },
    /// Two segments on one page, whose permissions would have to be mixed.
    #[error("two segments share the page at {0:#x}: align segments to 4096 bytes")]
    SharedPage(u64),
    /// A segment that could be written and executed.
    #[error("the segment at {0:#x} is writable and executable")]
    WritableCode(u64),
    /// The first instruction lies in no executable segment.
    #[error("the entry point {0:#x} is not in an executable segment")]
    BadEntry(u64),
}

/// A parsed image.
#[derive(Clone, Debug)]
pub struct Elf<'a> {
    /// Address of the first instruction.
    pub entry: u64,
    /// What to load, in ascending order and on disjoint pages.
    pub segments: Vec<ElfSegment<'a>>,
    /// The file.
    pub file: &'a [u8],
}

/// One `PT_LOAD` that is not empty.
#[derive(Clone, Debug)]
pub struct ElfSegment<'a> {
    /// First address.
    pub address: u64,
    /// Physical address (`p_paddr`): where a loader without paging puts it.
    pub physical: u64,
    /// Bytes in memory.
    pub bytes: u64,
    /// Contents; the rest of `bytes` is zero.
    pub data: &'a [u8],
    /// `PF_R`, `PF_W`, `PF_X`.
    flags: u32,
}

impl ElfSegment<'_> {
    /// True where it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.flags & elf::PF_W.0 != 0
    }
    /// True where it may be executed.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.flags & elf::PF_X.0 != 0
    }
    /// True where it may be read.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.flags & elf::PF_R.0 != 0
    }
    /// Address of its first page.
    #[must_use]
    pub fn first_page(&self) -> u64 {
        self.address & !(abi::layout::PAGE_SIZE - 1)
    }
    /// First address past its last page.
    #[must_use]
    pub fn end_page(&self) -> u64 {
        (self.address + self.bytes).next_multiple_of(abi::layout::PAGE_SIZE)
    }
}

impl<'a> Elf<'a> {
    /// Parses `file`.
    ///
    /// # Errors
    /// Whatever makes it no image; see [`ElfError`].
    pub fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        let header = FileHeader64::<Endianness>::parse(file)
            .map_err(|error| ElfError::NotElf(error.to_string()))?;
        let endian = header
            .endian()
            .map_err(|error| ElfError::NotElf(error.to_string()))?;
        if endian != Endianness::Little {
            return Err(ElfError::NotElf("it is big-endian".into()));
        }
        let machine = header.e_machine(endian);
        if machine != elf::EM_X86_64 {
            return Err(ElfError::WrongMachine { found: machine.0 });
        }
        let kind = header.e_type(endian);
        if kind != elf::ET_EXEC {
            return Err(ElfError::NotExecutable { found: kind.0 });
        }
        let mut segments = Vec::new();
        for program in header
            .program_headers(endian, file)
            .map_err(|error| ElfError::Damaged(error.to_string()))?
        {
            if program.p_type(endian) == elf::PT_LOAD && program.p_memsz(endian) != 0 {
                segments.push(segment(program, endian, file)?);
            }
        }
        segments.sort_by_key(|segment| segment.address);
        let elf = Self {
            entry: header.e_entry(endian),
            segments,
            file,
        };
        elf.check()?;
        Ok(elf)
    }

    /// Checks that every segment lies in `least..most`.
    ///
    /// # Errors
    /// [`ElfError::WrongAddress`].
    pub fn check_addresses(&self, least: u64, most: u64) -> Result<(), ElfError> {
        for segment in &self.segments {
            let found_end = segment.address + segment.bytes;
            if segment.address < least || found_end > most {
                return Err(ElfError::WrongAddress {
                    found: segment.address,
                    found_end,
                    least,
                    most,
                });
            }
        }
        Ok(())
    }

    /// Checks that every segment's physical address is its address less `offset`.
    ///
    /// # Errors
    /// [`ElfError::WrongPhysical`].
    pub fn check_physical(&self, offset: u64) -> Result<(), ElfError> {
        for segment in &self.segments {
            let expected = segment.address.wrapping_sub(offset);
            if segment.physical != expected {
                return Err(ElfError::WrongPhysical {
                    address: segment.address,
                    found: segment.physical,
                    expected,
                });
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ElfError> {
        if self.segments.is_empty() {
            return Err(ElfError::Empty);
        }
        for pair in self.segments.windows(2) {
            if pair[0].end_page() > pair[1].first_page() {
                return Err(ElfError::SharedPage(pair[1].first_page()));
            }
        }
        if let Some(bad) = self
            .segments
            .iter()
            .find(|segment| segment.is_writable() && segment.is_executable())
        {
            return Err(ElfError::WritableCode(bad.address));
        }
        self.segments
            .iter()
            .any(|segment| {
                segment.is_executable()
                    && (segment.address..segment.address + segment.bytes).contains(&self.entry)
            })
            .then_some(())
            .ok_or(ElfError::BadEntry(self.entry))
    }
}

fn segment<'a>(
    program: &elf::ProgramHeader64<Endianness>,
    endian: Endianness,
    file: &'a [u8],
) -> Result<ElfSegment<'a>, ElfError> {
    let address = program.p_vaddr(endian);
    let bytes = program.p_memsz(endian);
    let data = program.data(endian, file).map_err(|()| {
        ElfError::Damaged(format!(
            "the segment at {address:#x} points outside the file"
        ))
    })?;
    if data.len() as u64 > bytes {
        return Err(ElfError::Damaged(format!(
            "the segment at {address:#x} is larger in the file than in memory"
        )));
    }
    // Leaves room to round up to a page, so that no later sum overflows.
    if address
        .checked_add(bytes)
        .and_then(|end| end.checked_add(abi::layout::PAGE_SIZE))
        .is_none()
    {
        return Err(ElfError::Damaged(format!(
            "the segment at {address:#x} wraps around the address space"
        )));
    }
    Ok(ElfSegment {
        address,
        physical: program.p_paddr(endian),
        bytes,
        data,
        flags: program.p_flags(endian).0,
    })
}
