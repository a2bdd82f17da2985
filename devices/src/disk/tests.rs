//! Tests of the disk, with a guest that asks for anything.

use std::cell::RefCell;

use proptest::prelude::*;

use super::*;

const BYTES: u64 = 4 * PAGE_SIZE;
const AT: u64 = 64;

struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn new() -> Self {
        Self(RefCell::new(vec![0; BYTES as usize]))
    }
    fn range(gpa: u64, len: usize) -> Option<std::ops::Range<usize>> {
        let end = gpa.checked_add(len as u64)?;
        (end <= BYTES).then_some(gpa as usize..end as usize)
    }
    fn ask(&self, op: u32, sector: u64, gpa: u64, bytes: u64) {
        let mut request = [0; 32];
        request[0..4].copy_from_slice(&op.to_le_bytes());
        request[8..16].copy_from_slice(&sector.to_le_bytes());
        request[16..24].copy_from_slice(&gpa.to_le_bytes());
        request[24..32].copy_from_slice(&bytes.to_le_bytes());
        assert!(self.write(AT, &request));
    }
    fn status(&self) -> Option<DiskStatus> {
        let mut word = [0; 4];
        assert!(self.read(AT + 4, &mut word));
        DiskStatus::from_u32(u32::from_le_bytes(word))
    }
    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.read(gpa, &mut bytes));
        bytes
    }
}

impl Dma for Memory {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        let range = Self::range(gpa, bytes.len());
        range.is_some_and(|range| {
            bytes.copy_from_slice(&self.0.borrow()[range]);
            true
        })
    }
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        let range = Self::range(gpa, bytes.len());
        range.is_some_and(|range| {
            self.0.borrow_mut()[range].copy_from_slice(bytes);
            true
        })
    }
}

const READ: u32 = DiskOp::Read as u32;
const WRITE: u32 = DiskOp::Write as u32;

/// Submits what was asked for and lets it complete.
fn run(disk: &mut Disk, memory: &Memory) -> DiskStatus {
    let refused = disk.submit(0, AT, memory);
    assert_eq!(disk.in_flight(0), !refused);
    assert_eq!(disk.complete(0, memory), !refused);
    memory.status().unwrap()
}

#[test]
fn what_is_written_is_read_back_and_the_rest_is_blank() {
    let (mut disk, memory) = (Disk::new(64, 1, Vec::new()), Memory::new());
    memory.write(PAGE_SIZE, &[7; 1024]);
    memory.ask(WRITE, 7, PAGE_SIZE, 1024);
    assert_eq!(run(&mut disk, &memory), DiskStatus::Done);
    memory.ask(READ, 6, 2 * PAGE_SIZE, 4 * SECTOR_BYTES);
    assert_eq!(run(&mut disk, &memory), DiskStatus::Done);
    let expected = [[blank(6); 512], [7; 512], [7; 512], [blank(9); 512]].concat();
    assert_eq!(memory.bytes(2 * PAGE_SIZE, 2048), expected);
}

#[test]
fn data_move_when_a_request_completes_and_it_is_read_when_it_comes() {
    let (mut disk, memory) = (Disk::new(64, 2, Vec::new()), Memory::new());
    memory.ask(WRITE, 0, PAGE_SIZE, 512);
    assert!(!disk.submit(1, AT, &memory));
    assert!(disk.in_flight(1) && !disk.in_flight(0));
    assert!(!disk.complete(0, &memory), "nothing of CPU 0 is under way");
    memory.write(PAGE_SIZE, &[9; 512]);
    memory.ask(READ, 40, 0, 1 << 40); // too late
    assert!(disk.complete(1, &memory));
    assert_eq!(memory.status(), Some(DiskStatus::Done));
    memory.ask(READ, 0, 2 * PAGE_SIZE, 512);
    assert_eq!(run(&mut disk, &memory), DiskStatus::Done);
    assert_eq!(memory.bytes(2 * PAGE_SIZE, 512), [9; 512]);
}

#[test]
fn the_requests_that_are_to_go_wrong_do_and_no_other() {
    let faults = [(Wrong::Error, 2), (Wrong::Corrupt, 3)];
    let faults = faults.map(|(wrong, nth)| DiskFault { wrong, nth });
    let (mut disk, memory) = (Disk::new(64, 1, faults.to_vec()), Memory::new());
    let mut read = |memory: &Memory| {
        memory.write(PAGE_SIZE, &[0; 512]);
        memory.ask(READ, 1, PAGE_SIZE, 512);
        let status = run(&mut disk, memory);
        (status, memory.bytes(PAGE_SIZE, 2))
    };
    let good = (DiskStatus::Done, vec![blank(1); 2]);
    assert_eq!(read(&memory), good);
    assert_eq!(read(&memory), (DiskStatus::Error, vec![0; 2]));
    assert_eq!(
        read(&memory),
        (DiskStatus::Done, vec![blank(1) ^ 0xff, blank(1)])
    );
    assert_eq!(read(&memory), good);
}

#[test]
fn a_clone_is_the_state_with_what_is_under_way() {
    let (mut disk, memory) = (Disk::new(64, 1, Vec::new()), Memory::new());
    memory.ask(WRITE, 0, PAGE_SIZE, 512);
    disk.submit(0, AT, &memory);
    let saved = disk.clone();
    memory.write(PAGE_SIZE, &[5; 512]);
    disk.complete(0, &memory);
    assert_ne!(disk, saved);
    assert!(saved.in_flight(0) && !disk.in_flight(0));
    disk = saved;
    memory.write(PAGE_SIZE, &[6; 512]);
    assert!(disk.complete(0, &memory));
    memory.ask(READ, 0, 2 * PAGE_SIZE, 512);
    assert_eq!(run(&mut disk, &memory), DiskStatus::Done);
    assert_eq!(memory.bytes(2 * PAGE_SIZE, 512), [6; 512]);
}

#[test]
fn a_queue_that_is_full_refuses() {
    let (mut disk, memory) = (Disk::new(64, 1, Vec::new()), Memory::new());
    memory.ask(READ, 0, PAGE_SIZE, 512);
    for _ in 0..QUEUE {
        assert!(!disk.submit(0, AT, &memory));
    }
    assert!(disk.submit(0, AT, &memory));
    assert_eq!(memory.status(), Some(DiskStatus::Busy));
}

#[test]
fn only_a_whole_word_is_a_request() {
    let request = Effect::Disk {
        cpu: 2,
        request: 64,
    };
    assert_eq!(DiskPort.write(2, 0, &64u32.to_le_bytes()), request);
    assert_eq!(DiskPort.write(2, 0, &[64]), Effect::None);
    assert_eq!(DiskPort.write(2, 1, &[64, 0, 0]), Effect::None);
}

/// Numbers near every bound.
fn word() -> impl Strategy<Value = u64> {
    let near = |base: u64| {
        (0u64..8).prop_map(move |more| base.wrapping_add(more * 256).wrapping_sub(1024))
    };
    prop_oneof![
        near(0),
        near(512),
        near(BYTES),
        near(PAGE_SIZE),
        (0u64..64),
        any::<u64>(),
        (0u64..64).prop_map(|shift| 1 << shift),
    ]
}

proptest! {
    /// Whatever is asked for, the disk answers with what is true of it, and touches nothing else.
    #[test]
    fn no_request_does_more_than_it_may(
        asked in prop::collection::vec((0u32..4, word(), word(), word(), 0usize..3), 1..20),
        at in word(),
    ) {
        let (mut disk, memory) = (Disk::new(64, 2, Vec::new()), Memory::new());
        disk.submit(0, at, &memory);
        while disk.complete(0, &memory) {}
        for (op, sector, gpa, bytes, cpu) in asked {
            memory.ask(op, sector, gpa, bytes);
            let before = memory.0.borrow().clone();
            let refused = disk.submit(cpu, AT, &memory);
            let done = disk.complete(cpu, &memory);
            prop_assert!(!(refused && done));
            let fits = bytes > 0
                && bytes.is_multiple_of(512)
                && gpa.is_multiple_of(512)
                && bytes <= PAGE_SIZE
                && gpa < BYTES
                && gpa % PAGE_SIZE + bytes <= PAGE_SIZE
                && sector < 64
                && sector + bytes / 512 <= 64;
            prop_assert_eq!(done, fits && op < 2 && cpu < 2);
            let after = memory.0.borrow().clone();
            let may_change = |place: u64| {
                (AT + 4..AT + 8).contains(&place)
                    || done && op == READ && (gpa..gpa + bytes).contains(&place)
            };
            for (place, (before, after)) in before.iter().zip(&after).enumerate() {
                prop_assert!(before == after || may_change(place as u64), "{place:#x}");
            }
        }
    }
}
