//! The disk ([`abi::disk`]): contents, a queue of requests for each CPU, and faults on request.
//!
//! [`Disk`] is what the disk does; every engine has one and decides when a request completes. [`DiskPort`] is how a guest
//! on vCPUs reaches it. The contents are kept by pages that were written; the others read as [`blank`] says.
//!
//! The guest is hostile: it can ask for anything, and gets [`DiskStatus::Invalid`], or nothing where there is no memory to
//! answer in. What it can make the host keep is bounded by the size of the disk and [`QUEUE`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use abi::disk::{DiskOp, DiskRequest, DiskStatus, QUEUE, SECTOR_BYTES};
use abi::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};

/// Sectors of a disk where nobody says.
pub const DEFAULT_SECTORS: u64 = 2048;

/// Guest memory as a device sees it.
pub trait Dma {
    /// Copies from `gpa`. False where there is no such memory.
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool;
    /// Copies to `gpa`. False where there is no such memory.
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool;
}

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wrong {
    /// The medium fails: nothing is moved.
    Error,
    /// The first byte of the data is not what it should be, and nobody is told.
    Corrupt,
}

/// A fault on request: the `nth` request that the disk gets, from 1, goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFault {
    /// How.
    pub wrong: Wrong,
    /// Which request, of all CPUs, since boot.
    pub nth: u64,
}

/// A request that the disk has taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Request {
    /// Where the answer goes.
    at: u64,
    write: bool,
    sector: u64,
    gpa: u64,
    bytes: u64,
    wrong: Option<Wrong>,
}

/// A disk; a clone is the state of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    sectors: u64,
    faults: Vec<DiskFault>,
    /// By first sector divided by those of a page.
    pages: Arc<BTreeMap<u64, Vec<u8>>>,
    queues: Vec<VecDeque<Request>>,
    taken: u64,
}

impl Disk {
    /// A disk of `sectors` for `cpus` CPUs, with these faults.
    #[must_use]
    pub fn new(sectors: u64, cpus: usize, faults: Vec<DiskFault>) -> Self {
        Self {
            sectors,
            faults,
            pages: Arc::default(),
            queues: vec![VecDeque::new(); cpus],
            taken: 0,
        }
    }

    /// Takes the request at `at` into the queue of `cpu`. True where it was answered at once, because it cannot be
    /// done.
    pub fn submit(&mut self, cpu: usize, at: u64, memory: &impl Dma) -> bool {
        self.taken = self.taken.saturating_add(1);
        let mut bytes = [0; size_of::<DiskRequest>()];
        if !at.is_multiple_of(8) || !memory.read(at, &mut bytes) {
            return false;
        }
        let Some(queue) = self.queues.get_mut(cpu) else {
            return false;
        };
        let status = match parse(at, &bytes, self.sectors, memory) {
            None => DiskStatus::Invalid,
            Some(_) if queue.len() >= QUEUE => DiskStatus::Busy,
            Some(mut request) => {
                let nth = self.taken;
                let fault = self.faults.iter().find(|fault| fault.nth == nth);
                request.wrong = fault.map(|fault| fault.wrong);
                queue.push_back(request);
                return false;
            }
        };
        answer(at, status, memory);
        true
    }

    /// True where a request of `cpu` is under way.
    #[must_use]
    pub fn in_flight(&self, cpu: usize) -> bool {
        self.queues.get(cpu).is_some_and(|queue| !queue.is_empty())
    }

    /// Does the oldest request of `cpu` and answers it. True where there was one: the CPU is then to be interrupted.
    pub fn complete(&mut self, cpu: usize, memory: &impl Dma) -> bool {
        let Some(request) = self.queues.get_mut(cpu).and_then(VecDeque::pop_front) else {
            return false;
        };
        let status = match request.wrong {
            Some(Wrong::Error) => DiskStatus::Error,
            wrong => self.transfer(&request, wrong.is_some(), memory),
        };
        answer(request.at, status, memory);
        true
    }

    fn transfer(&mut self, request: &Request, corrupt: bool, memory: &impl Dma) -> DiskStatus {
        let mut data = vec![0; request.bytes as usize];
        if request.write && !memory.read(request.gpa, &mut data) {
            return DiskStatus::Error;
        }
        let spoil = |data: &mut [u8]| {
            if corrupt && let Some(first) = data.first_mut() {
                *first ^= 0xff;
            }
        };
        if request.write {
            spoil(&mut data);
            self.store(request.sector, &data);
        } else {
            self.load(request.sector, &mut data);
            spoil(&mut data);
            if !memory.write(request.gpa, &data) {
                return DiskStatus::Error;
            }
        }
        DiskStatus::Done
    }

    fn load(&self, sector: u64, data: &mut [u8]) {
        for (sector, part) in (sector..).zip(data.chunks_mut(SECTOR_BYTES as usize)) {
            let (page, offset) = place(sector);
            let bytes = self.pages.get(&page);
            match bytes.and_then(|bytes| bytes.get(offset..offset + part.len())) {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(blank(sector)),
            }
        }
    }

    fn store(&mut self, sector: u64, data: &[u8]) {
        let pages = Arc::make_mut(&mut self.pages);
        for (sector, part) in (sector..).zip(data.chunks(SECTOR_BYTES as usize)) {
            let (page, offset) = place(sector);
            let bytes = pages.entry(page).or_insert_with(|| {
                let first = page * (PAGE_SIZE / SECTOR_BYTES);
                let sectors = first..first + PAGE_SIZE / SECTOR_BYTES;
                sectors
                    .flat_map(|sector| [blank(sector); SECTOR_BYTES as usize])
                    .collect()
            });
            // A page from a file may have any length.
            bytes.resize(PAGE_SIZE as usize, 0);
            bytes[offset..offset + part.len()].copy_from_slice(part);
        }
    }
}

/// What every byte of a sector that was never written is: never zero, so that it can be told from fresh memory.
#[must_use]
pub const fn blank(sector: u64) -> u8 {
    0x80 | sector as u8
}

/// The page of the contents that a sector lies in, and where.
fn place(sector: u64) -> (u64, usize) {
    let each = PAGE_SIZE / SECTOR_BYTES;
    (sector / each, (sector % each * SECTOR_BYTES) as usize)
}

/// The request in `bytes`, if it can be done.
fn parse(at: u64, bytes: &[u8], sectors: u64, memory: &impl Dma) -> Option<Request> {
    use std::mem::offset_of;
    let word = |offset: usize| {
        let word = bytes.get(offset..offset + 8)?;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    };
    let op = DiskOp::from_u32(word(offset_of!(DiskRequest, op))? as u32)?;
    let sector = word(offset_of!(DiskRequest, sector))?;
    let gpa = word(offset_of!(DiskRequest, gpa))?;
    let bytes = word(offset_of!(DiskRequest, bytes))?;
    let aligned = gpa.is_multiple_of(SECTOR_BYTES) && bytes.is_multiple_of(SECTOR_BYTES);
    let in_frame = bytes > 0 && gpa % PAGE_SIZE + bytes.min(PAGE_SIZE + 1) <= PAGE_SIZE;
    let end = sector.checked_add(bytes / SECTOR_BYTES)?;
    let there = in_frame && memory.read(gpa, &mut vec![0; bytes as usize]);
    (aligned && there && end <= sectors).then_some(Request {
        at,
        write: op == DiskOp::Write,
        sector,
        gpa,
        bytes,
        wrong: None,
    })
}

fn answer(at: u64, status: DiskStatus, memory: &impl Dma) {
    let place = at + std::mem::offset_of!(DiskRequest, status) as u64;
    // There was memory when the request was read.
    let _ = memory.write(place, &(status as u32).to_le_bytes());
}

/// The port of the disk: a 4-byte write at offset 0 is the GPA of a request.
#[derive(Debug, Default)]
pub struct DiskPort;

impl Device for DiskPort {
    fn name(&self) -> &'static str {
        "disk"
    }
    fn read(&self, _cpu: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, cpu: usize, offset: u64, data: &[u8]) -> Effect {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(word)) => Effect::Disk {
                cpu,
                request: u32::from_le_bytes(word).into(),
            },
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests;
