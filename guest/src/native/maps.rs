//! [`Sys::maps`](crate::Sys::maps) on the host: the PROCMAP_QUERY ioctl of /proc/self/maps (Linux 6.11, fs/proc/task_mmu.c,
//! do_procmap_query), which costs a hundredth of reading the text, or the text where a kernel has it not.
//!
//! Nothing here allocates: it runs in forked processes of a program with threads.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use abi::oracle::Area;
use abi::syscall::{Errno, decode};

use super::own_file::{self, OwnFile};
use crate::rt::raw_syscall;

/// `struct procmap_query` of Linux's uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_and_build_id: [u32; 2],
    name_address: u64,
    build_id_address: u64,
}

const COVERING_OR_NEXT: u64 = 0x10;
/// Readable, writable, executable, shared: the bits of `vma_flags`.
const FLAGS: u64 = 0xf;
/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u64 = 3 << 30 | (size_of::<Query>() as u64) << 16 | (b'f' as u64) << 8 | 17;
const PATH: &CStr = c"/proc/self/maps";
const ENOENT: Errno = Errno(2);
const ENOTTY: Errno = Errno(25);

pub(super) fn read(start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
    static HAS_NO_QUERY: AtomicBool = AtomicBool::new(false);
    if !HAS_NO_QUERY.load(Relaxed) {
        match query_all(start, end, areas) {
            Err(ENOTTY) => HAS_NO_QUERY.store(true, Relaxed),
            result => return result,
        }
    }
    parse_all(start, end, areas)
}

fn query_all(start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
    static MAPS: OwnFile = OwnFile::new(PATH);
    let file = MAPS.descriptor()?;
    let mut at = start;
    for (found, area) in areas.iter_mut().enumerate() {
        let mut query = Query {
            size: size_of::<Query>() as u64,
            flags: COVERING_OR_NEXT,
            address: at,
            ..Query::default()
        };
        let to = (&raw mut query).expose_provenance() as u64;
        match call(libc::SYS_ioctl, [file, PROCMAP_QUERY, to]) {
            Err(ENOENT) => return Ok(found),
            result => result?,
        };
        if query.start >= end {
            return Ok(found);
        }
        at = query.end;
        *area = Area {
            start: query.start,
            end: query.end,
            flags: query.vma_flags & FLAGS,
        };
    }
    Ok(areas.len())
}

fn call(number: i64, [a, b, c]: [u64; 3]) -> Result<u64, Errno> {
    decode(raw_syscall(number.cast_unsigned(), [a, b, c, 0, 0, 0]))
}

/// From the text.
fn parse_all(start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
    let file = own_file::open(PATH)?;
    let mut parser = Parser::default();
    let mut found = 0;
    let mut buffer = [0u8; 4096];
    'read: while found < areas.len() {
        let to = buffer.as_mut_ptr().expose_provenance() as u64;
        let len = call(libc::SYS_read, [file, to, buffer.len() as u64])? as usize;
        for byte in &buffer[..len] {
            let Some(area) = parser.take(*byte) else {
                continue;
            };
            if area.end > start && area.start < end {
                areas[found] = area;
                found += 1;
            }
            if found == areas.len() || area.start >= end {
                break 'read;
            }
        }
        if len == 0 {
            break;
        }
    }
    call(libc::SYS_close, [file, 0, 0])?;
    Ok(found)
}

/// `start-end rwxs …` lines, byte by byte.
#[derive(Default)]
struct Parser {
    area: Area,
    /// What is being read: start, end, flags, the rest of the line.
    column: usize,
    place: u32,
}

impl Parser {
    /// The area of the line that `byte` ends.
    fn take(&mut self, byte: u8) -> Option<Area> {
        match (self.column, byte) {
            (_, b'\n') => return Some(std::mem::take(self).area),
            (0, b'-') | (1 | 2, b' ') => self.column += 1,
            (0, digit) => self.area.start = self.area.start << 4 | hex(digit),
            (1, digit) => self.area.end = self.area.end << 4 | hex(digit),
            (2, letter) => {
                let is_set = b"rwxs"[self.place as usize % 4] == letter;
                self.area.flags |= u64::from(is_set) << self.place;
                self.place += 1;
            }
            _ => {}
        }
        None
    }
}

fn hex(digit: u8) -> u64 {
    (digit as char).to_digit(16).unwrap_or(0).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_and_the_query_say_the_same() {
        let mut queried = [Area::default(); 500];
        let mut parsed = [Area::default(); 500];
        // Above what other tests map meanwhile: this test's own stack and the libraries.
        let here = (&raw const queried).addr() as u64;
        let from = here & !0xfff;
        let found = match query_all(from, u64::MAX, &mut queried) {
            Err(ENOTTY) => return eprintln!("skipped: this kernel has no PROCMAP_QUERY"),
            found => found.unwrap(),
        };
        let count = parse_all(from, u64::MAX, &mut parsed).unwrap();
        assert!(found > 0 && (queried[0].start..queried[0].end).contains(&here));
        assert_eq!(queried[0], parsed[0]);
        assert_eq!(queried[0].flags, 3);
        // vsyscall is no VMA, and only the text has it.
        assert!(count >= found);
    }

    #[test]
    fn lines_are_parsed_whatever_they_end_with() {
        let mut parser = Parser::default();
        let text = b"7f00-8f00 r-xp 00000000 fe:00 1 /lib/a b\n10000-11000 rw-s 0 0:0 0\n";
        let areas: Vec<Area> = text.iter().filter_map(|byte| parser.take(*byte)).collect();
        let area = |start, end, flags| Area { start, end, flags };
        assert_eq!(areas, [area(0x7f00, 0x8f00, 5), area(0x10000, 0x11000, 11)]);
    }
}
