//! A machine for host tests: an arena as memory, and CPUs that one thread plays in turn.
//!
//! Its TLBs are the worst that the architecture allows: every translation, and every pointer to a
//! table of leaf entries, is kept until a flush covers it, so a missing flush always has its
//! consequence. IPIs wait until a CPU spins ([`Arch::relax`]); what other CPUs do meanwhile is a test's
//! hook at a scheduling point ([`TestArch::at`]).
#![allow(unsafe_code, reason = "an arena that stands for physical memory")]

mod machine;

pub use machine::{Machine, boot_info};

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst};

use abi::channel::{Control, Doorbell, Event};
use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::objects::UserFrame;
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault, index};

use super::{Arch, CpuMask, Ipi, UserFault};
use crate::Kernel;

/// First frame for boot segments; the last ends at 64 KiB, where free memory starts.
pub const SEGMENTS: u64 = 0x8000;
const BOOT_PGD: u64 = 0x2000;
/// Turns of a spin loop after which nobody can make it end any more.
const PATIENCE: usize = 1000;

type Hook = Box<dyn FnOnce(&Kernel<TestArch>) + Send>;

/// What a user access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads a word.
    Read,
    /// Stores a word.
    Write,
    /// Fetches an instruction.
    Fetch,
}

impl Access {
    fn error(self) -> u64 {
        fault::USER
            | match self {
                Self::Read => 0,
                Self::Write => fault::WRITE,
                Self::Fetch => fault::FETCH,
            }
    }
    /// True where `entry`, a leaf, lets CPL 3 make the access.
    #[must_use]
    pub fn allowed_by(self, entry: Pte) -> bool {
        let flags = entry.flags();
        flags.contains(PteFlags::PRESENT | PteFlags::USER)
            && match self {
                Self::Read => true,
                Self::Write => flags.contains(PteFlags::WRITE),
                Self::Fetch => !flags.contains(PteFlags::NO_EXECUTE),
            }
    }
}

/// What one CPU may have cached.
#[derive(Default)]
pub struct Tlb {
    /// Leaf entries by page address.
    pub pages: BTreeMap<u64, Pte>,
    /// Level-1 tables by the first address that they cover.
    pub tables: BTreeMap<u64, u64>,
}

struct TestCpu {
    control: Box<Control>,
    pgd: AtomicU64,
    tlb: Mutex<Tlb>,
    ipis: AtomicU64,
    flushes: AtomicU64,
    events: Mutex<Vec<Event>>,
}

/// The machine.
pub struct TestArch {
    memory: AtomicPtr<u8>,
    bytes: u64,
    cpus: Vec<TestCpu>,
    current: AtomicUsize,
    clock: AtomicU64,
    kernel: AtomicPtr<Kernel<TestArch>>,
    hooks: Mutex<VecDeque<(Point, Hook)>>,
    spins: AtomicUsize,
}

impl TestArch {
    /// One CPU and memory, and nothing in it.
    #[must_use]
    pub fn bare(bytes: u64) -> Self {
        Self::new(bytes, 1)
    }

    fn new(bytes: u64, cpus: usize) -> Self {
        // SAFETY: the layout has a size that is not zero.
        let memory = unsafe { alloc_zeroed(arena(bytes)) };
        assert!(!memory.is_null());
        let cpu = || TestCpu {
            control: control(),
            pgd: AtomicU64::new(BOOT_PGD),
            tlb: Mutex::default(),
            ipis: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            events: Mutex::default(),
        };
        Self {
            memory: AtomicPtr::new(memory),
            bytes,
            cpus: std::iter::repeat_with(cpu).take(cpus).collect(),
            current: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            kernel: AtomicPtr::default(),
            hooks: Mutex::default(),
            spins: AtomicUsize::new(0),
        }
    }

    /// Runs `hook` when a CPU next passes `point`; hooks run in the order in which they were set, each
    /// once, and may act as other CPUs.
    pub fn at(&self, point: Point, hook: impl FnOnce(&Kernel<TestArch>) + Send + 'static) {
        self.hooks
            .lock()
            .unwrap()
            .push_back((point, Box::new(hook)));
        self.trap();
    }

    /// Hooks that have not run.
    pub fn hooks_left(&self) -> usize {
        self.hooks.lock().unwrap().len()
    }

    /// Page-wise and whole flushes of `cpu` so far.
    pub fn flushes(&self, cpu: usize) -> u64 {
        self.cpus[cpu].flushes.load(SeqCst)
    }

    /// What `cpu` has cached.
    pub fn tlb(&self, cpu: usize) -> std::sync::MutexGuard<'_, Tlb> {
        self.cpus[cpu].tlb.lock().unwrap()
    }

    /// Records events of every kind from now on.
    pub fn record_events(&self) {
        for cpu in &self.cpus {
            cpu.control.event_mask.store(u64::MAX, SeqCst);
        }
    }

    /// The events that `cpu` has recorded since the last call.
    pub fn take_events(&self, cpu: usize) -> Vec<Event> {
        std::mem::take(&mut *self.cpus[cpu].events.lock().unwrap())
    }

    /// Traps exactly the point of the first hook.
    fn trap(&self) {
        let point = self
            .hooks
            .lock()
            .unwrap()
            .front()
            .map(|(point, _)| *point as usize);
        for cpu in &self.cpus {
            for (i, word) in cpu.control.trap.iter().enumerate() {
                let mask = point.filter(|p| p / 64 == i).map_or(0, |p| 1 << (p % 64));
                word.store(mask, SeqCst);
            }
        }
    }

    fn this(&self) -> &TestCpu {
        &self.cpus[self.cpu()]
    }

    fn kernel(&self) -> &Kernel<TestArch> {
        let kernel = self.kernel.load(SeqCst);
        assert!(!kernel.is_null(), "the machine has no kernel yet");
        // SAFETY: `Machine` boxes the kernel and sets this once, and the kernel owns `self`, so it
        // lives at least as long as this borrow.
        unsafe { &*kernel }
    }

    fn deliver_ipis(&self) -> bool {
        let back = self.cpu();
        let mut any = false;
        for (cpu, state) in self.cpus.iter().enumerate() {
            if cpu != back && state.ipis.swap(0, SeqCst) != 0 {
                self.current.store(cpu, SeqCst);
                self.kernel().handle_shootdown();
                any = true;
            }
        }
        self.current.store(back, SeqCst);
        any
    }

    fn frame(&self, gpa: u64) -> *mut u64 {
        assert!(gpa.is_multiple_of(PAGE_SIZE) && gpa < self.bytes);
        self.phys_to_virt(gpa).cast()
    }

    fn read_word(&self, gpa: u64) -> u64 {
        self.word(gpa).load(SeqCst)
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        assert!(gpa.is_multiple_of(8) && gpa + 8 <= self.bytes);
        // SAFETY: an aligned word inside the arena, which lives as long as `self` and is shared by
        // atomic accesses.
        unsafe { &*self.phys_to_virt(gpa).cast::<AtomicU64>() }
    }

    /// Translates `gva` on this CPU as the processor does; the error code of the fault otherwise.
    fn translate(&self, gva: u64, access: Access) -> Result<u64, u64> {
        let cpu = self.this();
        let (page, region) = (gva & !(PAGE_SIZE - 1), gva & !0x1f_ffff);
        let mut tlb = cpu.tlb.lock().unwrap();
        let entry = match tlb.pages.get(&page) {
            Some(&entry) => Some(entry),
            None => {
                let table = match tlb.tables.get(&region) {
                    Some(&table) => Some(table),
                    None => self.walk_to_table(cpu.pgd.load(SeqCst), gva),
                };
                table.map(|table| {
                    tlb.tables.insert(region, table);
                    Pte(self.read_word(table + index(gva, 1) as u64 * 8))
                })
            }
        };
        let entry = entry.unwrap_or(Pte::NONE);
        if access.allowed_by(entry) {
            let flags = entry.flags();
            assert!(flags.contains(PteFlags::ACCESSED));
            assert!(!flags.contains(PteFlags::WRITE) || flags.contains(PteFlags::DIRTY));
            tlb.pages.insert(page, entry);
            return Ok(entry.address() + (gva - page));
        }
        // A fault invalidates what was cached for its address (SDM vol. 3A, 5.10.4.1).
        tlb.pages.remove(&page);
        tlb.tables.remove(&region);
        let present = if entry.is_present() {
            fault::PRESENT
        } else {
            0
        };
        Err(access.error() | present)
    }

    fn walk_to_table(&self, pgd: u64, gva: u64) -> Option<u64> {
        [4, 3, 2].into_iter().try_fold(pgd, |table, level| {
            let entry = Pte(self.read_word(table + index(gva, level) as u64 * 8));
            entry.is_present().then(|| entry.address())
        })
    }
}

impl Drop for TestArch {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout; nothing borrows from it any more.
        unsafe { dealloc(self.memory.load(SeqCst), arena(self.bytes)) };
    }
}

fn arena(bytes: u64) -> Layout {
    Layout::from_size_align(bytes as usize, PAGE_SIZE as usize).expect("a sane size")
}

fn control() -> Box<Control> {
    let layout = Layout::new::<Control>();
    // SAFETY: the layout is that of a `Control`, for which all zeroes is a valid value, as for every
    // struct of integers and atomics.
    let control = unsafe { Box::from_raw(alloc_zeroed(layout).cast::<Control>()) };
    control.budget.store(u64::MAX, SeqCst);
    control
}

impl Arch for TestArch {
    fn cpu(&self) -> usize {
        self.current.load(SeqCst)
    }
    fn nr_cpus(&self) -> usize {
        self.cpus.len()
    }
    fn phys_to_virt(&self, gpa: u64) -> *mut u8 {
        assert!(gpa < self.bytes, "guest physical address {gpa:#x}");
        self.memory.load(SeqCst).wrapping_add(gpa as usize)
    }
    fn zero_frame(&self, gpa: u64) {
        self.fill_frame(gpa, 0);
    }
    fn fill_frame(&self, gpa: u64, word: u64) {
        for offset in (0..PAGE_SIZE).step_by(8) {
            self.word(gpa + offset).store(word, SeqCst);
        }
    }
    fn copy_frame(&self, from: u64, to: u64) {
        // SAFETY: two whole frames of the arena; this thread is the only one.
        unsafe { std::ptr::copy(self.frame(from), self.frame(to), ENTRIES_PER_TABLE) };
    }
    fn flush_page(&self, gva: u64) {
        let cpu = self.this();
        cpu.flushes.fetch_add(1, SeqCst);
        let mut tlb = cpu.tlb.lock().unwrap();
        tlb.pages.remove(&(gva & !(PAGE_SIZE - 1)));
        // INVLPG invalidates all paging-structure caches (SDM vol. 3A, 5.10.4.1).
        tlb.tables.clear();
    }
    fn flush_all(&self) {
        self.this().flushes.fetch_add(1, SeqCst);
        *self.this().tlb.lock().unwrap() = Tlb::default();
    }
    fn load_root(&self, pgd: u64) {
        self.this().pgd.store(pgd, SeqCst);
        *self.this().tlb.lock().unwrap() = Tlb::default();
    }
    fn current_root(&self) -> u64 {
        self.this().pgd.load(SeqCst)
    }
    fn send_ipi(&self, targets: CpuMask, ipi: Ipi) {
        assert_eq!(targets & (1 << self.cpu()), 0, "a CPU interrupts itself");
        for (cpu, state) in self.cpus.iter().enumerate() {
            if targets & (1 << cpu) != 0 && ipi == Ipi::Shootdown {
                state.ipis.store(1, SeqCst);
            }
        }
    }
    fn relax(&self) {
        if self.deliver_ipis() {
            self.spins.store(0, SeqCst);
        } else {
            let spins = self.spins.fetch_add(1, SeqCst);
            assert!(spins < PATIENCE, "CPU {} waits forever", self.cpu());
        }
    }
    fn wait_for_interrupt(&self) {
        panic!("CPU {} idles: this machine schedules nothing", self.cpu());
    }
    fn copy_from_user(&self, dst: &mut [u8], gva: u64) -> Result<(), UserFault> {
        for (byte, gva) in dst.iter_mut().zip(gva..) {
            let word = self
                .kernel()
                .user_access(gva & !7, Access::Read, |w| w.load(SeqCst));
            *byte = word.map_err(|_| UserFault { gva })?.to_le_bytes()[(gva & 7) as usize];
        }
        Ok(())
    }
    fn copy_to_user(&self, gva: u64, src: &[u8]) -> Result<(), UserFault> {
        for (&byte, gva) in src.iter().zip(gva..) {
            let put = |word: &AtomicU64| {
                let mut bytes = word.load(SeqCst).to_le_bytes();
                bytes[(gva & 7) as usize] = byte;
                word.store(u64::from_le_bytes(bytes), SeqCst);
            };
            let done = self.kernel().user_access(gva & !7, Access::Write, put);
            done.map_err(|_| UserFault { gva })?;
        }
        Ok(())
    }
    fn prepare_stack(&self, _stack: *mut u8, _bytes: usize, _frame: &UserFrame) -> u64 {
        panic!("this machine runs no threads");
    }
    unsafe fn switch(&self, _from: &AtomicU64, _to: u64) {
        panic!("this machine runs no threads");
    }
    fn set_kernel_stack(&self, _top: u64) {}
    fn channel(&self) -> &Control {
        &self.this().control
    }
    fn write_event(&self, _slot: usize, event: &Event) {
        self.this().events.lock().unwrap().push(*event);
    }
    fn doorbell(&self, reason: Doorbell) {
        if reason != Doorbell::Point {
            return;
        }
        let passed = self.channel().point.load(SeqCst);
        let hook = {
            let mut hooks = self.hooks.lock().unwrap();
            match hooks.front() {
                Some((point, _)) if *point as u64 == passed => hooks.pop_front(),
                _ => None,
            }
        };
        if let Some((_, hook)) = hook {
            self.trap();
            let back = self.cpu();
            hook(self.kernel());
            self.current.store(back, SeqCst);
        }
    }
    fn tsc(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }
    fn console(&self, bytes: &[u8]) {
        eprint!("{}", String::from_utf8_lossy(bytes));
    }
    fn exit(&self, status: u32) -> ! {
        panic!("the kernel ended the machine with status {status}");
    }
}
