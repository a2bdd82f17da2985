//! The model, played by a test: it calls the kernel itself, as one CPU after another, so the calls nest on
//! the test's own stack and no coroutine is needed.
//!
//! What other CPUs do in the middle of a call is a test's hook at a scheduling point ([`Model::at`]). A CPU
//! that waits for others lets them take their IPIs; if nobody then has anything to take, it waits forever,
//! which fails the test. Programs' accesses go through the kernel's soft TLB (`tlb=soft`), so a missing
//! flush always has its consequence.

mod machine;

pub(crate) use machine::{Machine, SEGMENTS, boot_info};

use std::boxed::Box;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use abi::channel::Doorbell;
use abi::disk::{DiskOp, DiskStatus};
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, SoftEntry};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};

use super::{Arch, Ipi, Model, bit};
use crate::Kernel;
use crate::mm::{FaultError, Field, soft_key_in};

/// Turns of a spin loop after which nobody can make it end any more.
const PATIENCE: usize = 1000;
/// Tag of an entry of a soft TLB that was removed.
const REMOVED: u64 = 2;
/// Set in the tag of a translation of 2 MiB.
const HUGE: u64 = 0x800;
/// Where a CPU waits for what others do.
const WAITS: [Point; 4] = [
    Point::FlushWait,
    Point::LockWait,
    Point::RcuWait,
    Point::DiskWait,
];

type Hook = Box<dyn FnOnce(&Kernel<Model>) + Send>;

/// What is to happen at scheduling points, and what has.
#[derive(Default)]
pub(super) struct Script {
    hooks: Mutex<VecDeque<(Point, Hook)>>,
    spins: AtomicUsize,
    disk: Mutex<TestDisk>,
}

/// What the swap area and files are on: it does what it is asked for when a CPU waits for it.
#[derive(Default)]
pub(crate) struct TestDisk {
    pages: BTreeMap<u64, [u8; PAGE_SIZE as usize]>,
    /// Requests of this kind fail.
    pub(crate) fails: Option<DiskOp>,
    /// Requests done: reads, writes.
    pub(crate) done: [usize; 2],
}

impl TestDisk {
    /// What it holds from `sector` on.
    pub(crate) fn page(&mut self, sector: u64) -> &mut [u8; PAGE_SIZE as usize] {
        self.pages.entry(sector).or_insert([0xdb; _])
    }
}

impl Script {
    fn hooks(&self) -> MutexGuard<'_, VecDeque<(Point, Hook)>> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a user access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Loads a word.
    Read,
    /// Stores a word.
    Write,
    /// Fetches an instruction.
    Fetch,
}

impl Access {
    /// True where `entry`, a leaf, lets CPL 3 make the access.
    pub(crate) fn allowed_by(self, entry: Pte) -> bool {
        let flags = entry.flags();
        flags.contains(PteFlags::PRESENT | PteFlags::USER)
            && match self {
                Self::Read => true,
                Self::Write => flags.contains(PteFlags::WRITE),
                Self::Fetch => !flags.contains(PteFlags::NO_EXECUTE),
            }
    }
}

/// What one CPU's soft TLB holds.
pub(crate) struct Tlb {
    /// Leaf entries by page address.
    pub(crate) pages: BTreeMap<u64, Pte>,
    /// Leaf entries of 2 MiB by the first address that they translate.
    pub(crate) huge: BTreeMap<u64, Pte>,
    /// Level-1 tables by the first address that they cover.
    pub(crate) tables: BTreeMap<u64, u64>,
}

impl Model {
    /// Runs `hook` when a CPU next passes `point`; hooks run in the order in which they were set, each
    /// once, and may act as other CPUs.
    pub(crate) fn at(&self, point: Point, hook: impl FnOnce(&Kernel<Model>) + Send + 'static) {
        self.script.hooks().push_back((point, Box::new(hook)));
        self.trap();
    }

    /// Hooks that have not run.
    pub(crate) fn hooks_left(&self) -> usize {
        self.script.hooks().len()
    }

    /// Records events of every kind from now on.
    pub(crate) fn record_events(&self) {
        self.for_each_cpu(|| self.channel().event_mask.store(u64::MAX, Relaxed));
    }

    /// The calling test acts as `cpu` from now on.
    pub(crate) fn become_cpu(&self, cpu: usize) {
        self.current.store(cpu, Relaxed);
    }

    /// IPIs sent to `cpu` that it has not taken; takes them.
    pub(crate) fn take_pending(&self, cpu: usize) -> Vec<Ipi> {
        let sent = self.cpus[cpu].in_flight.swap(0, Relaxed);
        let is_sent = |ipi: &Ipi| sent & bit(*ipi as u8) != 0;
        let all = [Ipi::Reschedule, Ipi::Shootdown];
        all.into_iter().filter(is_sent).collect()
    }

    /// What kernel code that runs in no coroutine does at a doorbell.
    pub(super) fn play(&self, reason: Doorbell) {
        assert_eq!(reason, Doorbell::Point, "the machine is a test's");
        let passed = self.channel().point.load(Relaxed);
        let hook = {
            let mut hooks = self.script.hooks();
            hooks
                .pop_front_if(|(point, _)| *point as u64 == passed)
                .map(|(_, hook)| hook)
        };
        if let Some(hook) = hook {
            self.trap();
            let back = self.cpu();
            hook(self.kernel());
            self.become_cpu(back);
        } else if passed == Point::DiskWait as u64 {
            self.serve_disk();
        } else if WAITS.iter().any(|wait| *wait as u64 == passed) {
            self.let_others_take_ipis();
        }
    }

    /// The disk.
    pub(crate) fn disk(&self) -> MutexGuard<'_, TestDisk> {
        let disk = &self.script.disk;
        disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does all that the disk was asked for.
    pub(crate) fn serve_disk(&self) {
        let (k, mut disk) = (self.kernel(), self.disk());
        for request in &k.root().swap.requests {
            let asked = &request.disk;
            if request.folio.get() == 0 || asked.status.get() != DiskStatus::Pending as u32 {
                continue;
            }
            let op = DiskOp::from_u32(asked.op.get()).unwrap();
            let (sector, gpa) = (asked.sector.get(), asked.gpa.get());
            disk.done[op as usize] += 1;
            let status = if disk.fails == Some(op) {
                DiskStatus::Error
            } else {
                let page = disk.page(sector);
                match op {
                    DiskOp::Write => k.load_memory(gpa, page),
                    DiskOp::Read => k.store_memory(gpa, page),
                }
                DiskStatus::Done
            };
            asked.status.set(status as u32);
        }
        self.take_submitted();
    }

    fn let_others_take_ipis(&self) {
        let back = self.cpu();
        let mut any = false;
        for cpu in (0..self.nr_cpus()).filter(|cpu| *cpu != back) {
            self.become_cpu(cpu);
            self.deliver(cpu);
            let k = self.kernel();
            let quiescent = k.this_cpu().rcu.watching.get().is_multiple_of(2);
            any |= self.take_ipis();
            if quiescent {
                k.rcu_leave_kernel();
            }
        }
        self.become_cpu(back);
        let spins = if any {
            0
        } else {
            self.script.spins.load(Relaxed) + 1
        };
        assert!(spins < PATIENCE, "CPU {back} waits forever");
        self.script.spins.store(spins, Relaxed);
    }

    /// Traps the waits and the point of the first hook, on every CPU.
    pub(super) fn trap(&self) {
        let first = self.script.hooks().front().map(|(point, _)| *point);
        let mut trap = [0; 4];
        for point in WAITS.into_iter().chain(first) {
            trap[point as usize / 64] |= 1 << (point as usize % 64);
        }
        self.for_each_cpu(|| {
            for (word, mask) in self.channel().trap.iter().zip(trap) {
                word.store(mask, Relaxed);
            }
        });
    }

    fn for_each_cpu(&self, mut act: impl FnMut()) {
        let back = self.cpu();
        for cpu in 0..self.nr_cpus() {
            self.become_cpu(cpu);
            act();
        }
        self.become_cpu(back);
    }
}

/// What programs do, on the CPU that the test plays.
impl Kernel<Model> {
    /// Runs `f` as CPU `cpu`.
    pub(crate) fn on<T>(&self, cpu: usize, f: impl FnOnce(&Self) -> T) -> T {
        let back = self.arch.cpu();
        self.arch.become_cpu(cpu);
        let result = f(self);
        self.arch.become_cpu(back);
        result
    }

    /// A fault of this CPU, which comes into the kernel for it.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub(crate) fn fault(&self, mm: Pa<Mm>, gva: u64, error: u64) -> Result<(), FaultError> {
        let outside = self.this_cpu().rcu.watching.load(Relaxed).is_multiple_of(2);
        self.rcu_enter_kernel();
        let result = self.handle_fault(mm, gva, error);
        if outside {
            self.rcu_leave_kernel();
        }
        result
    }

    /// Reads the word at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub(crate) fn user_read(&self, cpu: usize, gva: u64) -> Result<u64, FaultError> {
        self.on(cpu, |k| {
            let gpa = k.user_access(gva, Access::Read)?;
            Ok(k.memory_word(gpa).load(Relaxed))
        })
    }

    /// Writes the word at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub(crate) fn user_write(&self, cpu: usize, gva: u64, value: u64) -> Result<(), FaultError> {
        self.on(cpu, |k| {
            let gpa = k.user_access(gva, Access::Write)?;
            k.memory_word(gpa).store(value, Relaxed);
            Ok(())
        })
    }

    /// Fetches an instruction at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub(crate) fn user_fetch(&self, cpu: usize, gva: u64) -> Result<(), FaultError> {
        self.on(cpu, |k| k.user_access(gva, Access::Fetch).map(drop))
    }

    fn user_access(&self, gva: u64, access: Access) -> Result<u64, FaultError> {
        let mm: Pa<Mm> = self.this_cpu().loaded_mm.get();
        for _ in 0..8 {
            match self.try_access(gva, access) {
                Ok(gpa) => return Ok(gpa),
                Err(error) => self.fault(mm, gva, error)?,
            }
        }
        panic!("{access:?} of {gva:#x} faults forever");
    }

    /// The soft TLB serves loads and stores; a fetch is a load whose entry must permit it too.
    fn try_access(&self, gva: u64, access: Access) -> Result<u64, u64> {
        let found = self.soft_translate(gva, access == Access::Write);
        let fetch = if access == Access::Fetch {
            fault::FETCH
        } else {
            0
        };
        let gpa = found.map_err(|code| code | fetch)?.gpa;
        let page = gva & !0xfff;
        let region = gva & !0x1f_ffff;
        let held = self.tlb(self.arch.cpu());
        let entry = held.pages.get(&page).or_else(|| held.huge.get(&region));
        let entry = *entry.expect("what was used is held");
        let (page_key, region_key) = (self.soft_key(page), self.soft_key(region));
        let flags = entry.flags();
        assert!(flags.contains(PteFlags::ACCESSED));
        assert!(!flags.contains(PteFlags::WRITE) || flags.contains(PteFlags::DIRTY));
        if access.allowed_by(entry) {
            return Ok(gpa);
        }
        // A fault invalidates what was cached for its address (SDM vol. 3A, 5.10.4.1).
        let tlb = self.obj(self.this_cpu().soft_tlb.get());
        for (entries, key) in [
            (&tlb.pages[..], page_key),
            (&tlb.pages[..], region_key | HUGE),
            (&tlb.tables[..], region_key),
        ] {
            let held = entries.iter().filter(|entry| entry.tag.get() == key | 1);
            held.for_each(|entry| entry.tag.set(REMOVED));
        }
        Err(fault::USER | fault::FETCH | fault::PRESENT)
    }

    /// What `cpu` has cached of the address space that it has loaded.
    ///
    /// # Panics
    /// Where it was too small for everything: then a test may miss what it is there for.
    pub(crate) fn tlb(&self, cpu: usize) -> Tlb {
        self.tlb_of(cpu, self.root().cpus[cpu].pcid.get())
    }

    /// What `cpu` has cached under `pcid`, loaded or not.
    ///
    /// # Panics
    /// As [`Kernel::tlb`].
    pub(crate) fn tlb_of(&self, cpu: usize, pcid: u64) -> Tlb {
        let used = |entries: &'_ [SoftEntry], size: u64| {
            let own = soft_key_in(pcid, 0) | 1 | size;
            let words = entries.iter().map(|e| (e.tag.get(), e.value.get()));
            let words = words.filter(|(tag, _)| tag & 0xfff == own);
            words
                .map(|(tag, value)| (tag - own, value))
                .collect::<Vec<_>>()
        };
        let tlb = self.obj(self.root().cpus[cpu].soft_tlb.get());
        assert_eq!(tlb.evictions.get(), 0, "the soft TLB of CPU {cpu} is full");
        Tlb {
            pages: used(&tlb.pages, 0)
                .into_iter()
                .map(|(gva, entry)| (gva, Pte(entry)))
                .collect(),
            huge: used(&tlb.pages, HUGE)
                .into_iter()
                .map(|(gva, entry)| (gva, Pte(entry)))
                .collect(),
            tables: used(&tlb.tables, 0).into_iter().collect(),
        }
    }
}
