//! The first process: the user image, its arguments, and its data.

use abi::boot::Segment;
use abi::layout::{PAGE_SIZE, USER_ARGS_GVA, USER_BRK_START, USER_DATA_GVA, USER_IMAGE_GVA};
use abi::syscall::prot;

use super::frames::Frames;
use super::{BootError, Elf};
use crate::memory::GuestRam;

/// Which user program runs, and with what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramSpec {
    /// Name of the program in the user image.
    pub name: String,
    /// Its parameters; the program sees `key=value`.
    pub args: Vec<(String, String)>,
    /// Data blob at [`USER_DATA_GVA`], for programs that take one.
    pub data: Option<Vec<u8>>,
}

/// The first process in guest memory.
pub(super) struct Process {
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
    pub(super) args_len: u64,
    pub(super) data_len: u64,
}

/// Copies image, arguments and data into frames of their own.
pub(super) fn load(
    ram: &GuestRam,
    frames: &mut Frames,
    elf: &Elf<'_>,
    program: &ProgramSpec,
) -> Result<Process, BootError> {
    elf.check_addresses(USER_IMAGE_GVA, USER_ARGS_GVA)
        .map_err(BootError::User)?;
    let mut segments = Vec::new();
    for segment in &elf.segments {
        let bytes = segment.end_page() - segment.first_page();
        let gpa = frames.take(bytes, "user image")?;
        ram.write(gpa + segment.address % PAGE_SIZE, segment.data)?;
        let mut protection = prot::NONE;
        for (has, bit) in [
            (segment.is_readable(), prot::READ),
            (segment.is_writable(), prot::WRITE),
            (segment.is_executable(), prot::EXEC),
        ] {
            protection |= if has { bit } else { 0 };
        }
        segments.push(Segment {
            gva: segment.first_page(),
            gpa,
            bytes,
            prot: protection,
        });
    }

    let args = argument_page(program)?;
    segments.push(blob(ram, frames, USER_ARGS_GVA, &args, "argument page")?);
    let data = program.data.as_deref().unwrap_or_default();
    if !data.is_empty() {
        let maximum = (USER_BRK_START - USER_DATA_GVA) as usize;
        if data.len() > maximum {
            return Err(BootError::DataTooLong {
                given: data.len(),
                maximum,
            });
        }
        segments.push(blob(ram, frames, USER_DATA_GVA, data, "program's data")?);
    }
    Ok(Process {
        entry: elf.entry,
        segments,
        args_len: args.len() as u64,
        data_len: data.len() as u64,
    })
}

/// The NUL-terminated strings of the argument page: the program's name, then `key=value` each.
fn argument_page(program: &ProgramSpec) -> Result<Vec<u8>, BootError> {
    let mut page = Vec::new();
    let words = program
        .args
        .iter()
        .map(|(key, value)| format!("{key}={value}"));
    for word in std::iter::once(program.name.clone()).chain(words) {
        if word.contains('\0') {
            return Err(BootError::ArgumentWithNul(word));
        }
        page.extend_from_slice(word.as_bytes());
        page.push(0);
    }
    if page.len() > PAGE_SIZE as usize {
        return Err(BootError::ArgumentsTooLong {
            given: page.len(),
            maximum: PAGE_SIZE as usize,
        });
    }
    Ok(page)
}

fn blob(
    ram: &GuestRam,
    frames: &mut Frames,
    gva: u64,
    data: &[u8],
    what: &'static str,
) -> Result<Segment, BootError> {
    let bytes = (data.len() as u64).next_multiple_of(PAGE_SIZE);
    let gpa = frames.take(bytes, what)?;
    ram.write(gpa, data)?;
    Ok(Segment {
        gva,
        gpa,
        bytes,
        prot: prot::READ,
    })
}
