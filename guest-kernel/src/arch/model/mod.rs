//! The model: the same kernel inside a host process, where one thread plays all CPUs.
//!
//! Every kernel stack, and every CPU's idle loop, is a coroutine ([`Contexts`]); a "stack pointer" is its
//! number. Physical memory is an arena that the embedder gives, laid out by the same loader as on the
//! real machine, channels included. There is no TLB here: programs' accesses go through the kernel's
//! soft TLB. IPIs are taken where the real machine takes them: as soon as interrupts are on.
//!
//! A CPU stops by suspending its coroutine with the reason ([`Pause`]); [`Model::resume`] lets it go on.
#![allow(
    unsafe_code,
    reason = "an arena that stands for physical memory, and coroutines"
)]

mod contexts;
#[cfg(test)]
pub(crate) mod testing;

use std::cell::RefCell;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, AtomicUsize};
use std::vec::Vec;

use abi::boot::BootInfo;
use abi::channel::{Control, Doorbell, Event};
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, ENTRIES_PER_TABLE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{KernelRoot, UserFrame};
use abi::pte::{Pte, PteFlags, fault, index, level_size};

use super::{Arch, CpuMask, Ipi, UserFault};
use crate::Kernel;
use contexts::Contexts;
pub use contexts::Pause;

/// What a program is: runs as CPL 3 of a task, and returns only when its task is over.
pub type Program = fn(&'static Kernel<Model>);

#[derive(Default)]
struct ModelCpu {
    root: AtomicU64,
    /// IPIs on their way, bit by [`bit`].
    in_flight: AtomicU64,
    /// IPIs that it takes as soon as it may.
    pending: AtomicU64,
    /// INVLPGs and reloads of CR3 that were executed for a flush.
    flushes: AtomicU64,
}

/// The machine.
pub struct Model {
    memory: AtomicPtr<u8>,
    bytes: u64,
    cpus: Vec<ModelCpu>,
    current: AtomicUsize,
    /// A byte per frame: 1 where it may have been written since the last [`Model::take_dirty`].
    dirty: Vec<AtomicU8>,
    contexts: Contexts,
    kernel: AtomicPtr<Kernel<Model>>,
    program: Program,
    clock: AtomicU64,
    events: Shared<Vec<Event>>,
    /// Requests to the disk: CPU and GPA.
    submitted: Shared<Vec<(usize, u64)>>,
    console: Shared<String>,
    #[cfg(test)]
    script: testing::Script,
}

/// State of the one thread that drives a machine.
struct Shared<T>(RefCell<T>);

// SAFETY: a machine is driven by one thread at a time ([`Model::new`]'s contract); its coroutines run on
// that thread. `Arch` asks for `Sync` because CPUs of other machines are threads.
unsafe impl<T: Send> Sync for Shared<T> {}

fn bit(vector: u8) -> u64 {
    1 << (vector & 0xf)
}

/// Interrupts by falling vector, as a local APIC delivers them.
const BY_PRIORITY: [u8; 3] = [
    abi::disk::VECTOR,
    Ipi::Reschedule as u8,
    Ipi::Shootdown as u8,
];

impl Model {
    /// A machine of `cpus` CPUs over `bytes` bytes of memory at `memory`, which boot has filled.
    ///
    /// # Safety
    /// The memory is page aligned, stays allocated for the machine's life, and is touched by nobody else
    /// but through atomics or between two calls; one thread at a time uses the machine.
    pub unsafe fn new(memory: *mut u8, bytes: u64, cpus: usize, program: Program) -> Self {
        let frames = (bytes >> PAGE_SHIFT) as usize;
        Self {
            memory: AtomicPtr::new(memory),
            bytes,
            cpus: (0..cpus).map(|_| ModelCpu::default()).collect(),
            current: AtomicUsize::new(0),
            dirty: (0..frames).map(|_| AtomicU8::new(0)).collect(),
            contexts: Contexts::new(cpus),
            kernel: AtomicPtr::default(),
            program,
            clock: AtomicU64::new(0),
            events: Shared(RefCell::new(Vec::new())),
            submitted: Shared(RefCell::new(Vec::new())),
            console: Shared(RefCell::new(String::new())),
            #[cfg(test)]
            script: testing::Script::default(),
        }
    }

    /// Boots `kernel` (made by [`Kernel::boot`] over this machine) as arch/x86_64 does: CPU 0 starts the
    /// first process, the others halt until it tells them.
    pub fn start(kernel: &'static Kernel<Model>, info: &BootInfo) {
        let arch = &kernel.arch;
        let pointer = core::ptr::from_ref(kernel).cast_mut();
        arch.kernel.store(pointer, Relaxed);
        arch.current.store(0, Relaxed);
        for cpu in &arch.cpus {
            cpu.root.store(info.boot_pgd, Relaxed);
        }
        for cpu in 0..arch.cpus.len() {
            let context = arch.contexts.add(move || {
                if cpu != 0 {
                    kernel.arch.wait_for_interrupt();
                }
                kernel.run_cpu()
            });
            arch.contexts.place(cpu, context);
        }
        kernel.start_first_process(info);
        let others = (1 << arch.cpus.len()) - 2;
        if others != 0 {
            arch.send_ipi(others, Ipi::Reschedule);
        }
    }

    /// Lets CPU `cpu` run until it stops.
    pub fn resume(&self, cpu: usize) -> Pause {
        self.current.store(cpu, Relaxed);
        self.contexts.resume(cpu)
    }

    /// Forgets every context without unwinding it: for a machine whose memory is about to be replaced.
    pub fn forget_contexts(&self) {
        self.contexts.clear();
        for cpu in &self.cpus {
            cpu.in_flight.store(0, Relaxed);
            cpu.pending.store(0, Relaxed);
        }
        self.events.0.borrow_mut().clear();
        self.submitted.0.borrow_mut().clear();
        self.console.0.borrow_mut().clear();
        self.clock.store(0, Relaxed);
    }

    /// True where an IPI is on its way to `cpu`.
    pub fn in_flight(&self, cpu: usize) -> bool {
        self.cpus[cpu].in_flight.load(Relaxed) != 0
    }
    /// True where `cpu` will take an IPI as soon as it may.
    pub fn pending(&self, cpu: usize) -> bool {
        self.cpus[cpu].pending.load(Relaxed) != 0
    }
    /// Makes every IPI that is on its way to `cpu` pending.
    pub fn deliver(&self, cpu: usize) {
        let state = &self.cpus[cpu];
        let arrived = state.in_flight.swap(0, Relaxed);
        state.pending.fetch_or(arrived, Relaxed);
    }

    /// The requests to the disk since the last call: each CPU, and the GPA of what it asks for.
    pub fn take_submitted(&self) -> Vec<(usize, u64)> {
        std::mem::take(&mut self.submitted.0.borrow_mut())
    }
    /// A request of `cpu` is done.
    pub fn interrupt_of_disk(&self, cpu: usize) {
        let pending = &self.cpus[cpu].pending;
        pending.fetch_or(bit(abi::disk::VECTOR), Relaxed);
    }
    /// The device is about to write the frame at `gpa`.
    pub fn will_write(&self, gpa: u64) {
        if let Some(dirty) = self.dirty.get((gpa >> PAGE_SHIFT) as usize) {
            dirty.store(1, Relaxed);
        }
    }

    /// Moves what was recorded since the last call to `to`.
    pub fn take_events(&self, to: &mut Vec<Event>) {
        to.append(&mut self.events.0.borrow_mut());
    }
    /// Forgets what was recorded since.
    pub fn drop_events(&self) {
        self.events.0.borrow_mut().clear();
    }
    /// What the kernel has printed.
    pub fn console_text(&self) -> String {
        self.console.0.borrow().clone()
    }
    /// The paging root that `cpu` has loaded.
    pub fn root_of(&self, cpu: usize) -> u64 {
        self.cpus[cpu].root.load(Relaxed)
    }

    /// Flushes that `cpu` has executed, page-wise and whole; a load of another root is none.
    pub fn flushes(&self, cpu: usize) -> u64 {
        self.cpus[cpu].flushes.load(Relaxed)
    }

    /// Calls `f` with the GPA of each frame that may have been written since the last call.
    pub fn take_dirty(&self, mut f: impl FnMut(u64)) {
        // SAFETY: atomics of any size may be read as those of another; nobody else uses them meanwhile.
        let (before, words, after) = unsafe { self.dirty.align_to::<AtomicU64>() };
        let mut take = |first: usize, dirty: &[AtomicU8]| {
            for (frame, dirty) in (first..).zip(dirty) {
                if dirty.load(Relaxed) != 0 {
                    dirty.store(0, Relaxed);
                    f((frame as u64) << PAGE_SHIFT);
                }
            }
        };
        take(0, before);
        // Most words say that none of eight frames was written.
        for (index, word) in words.iter().enumerate() {
            if word.load(Relaxed) != 0 {
                let first = before.len() + index * 8;
                take(first, &self.dirty[first..first + 8]);
            }
        }
        take(self.dirty.len() - after.len(), after);
    }

    /// Registers of CPL 3 of the task that runs, while its program does.
    ///
    /// # Panics
    /// Outside a program.
    pub fn user_frame(&self) -> *mut UserFrame {
        let frame = self.contexts.user_frame();
        assert!(!frame.is_null(), "no program runs");
        frame
    }

    /// What happens between two instructions of CPL 3: pending IPIs are taken.
    pub fn user_boundary(&self, frame: &mut UserFrame) {
        let kernel = self.kernel();
        kernel.return_to_user(frame);
        while self.take_one_ipi() {
            kernel.return_to_user(frame);
        }
    }

    /// Where the program's own byte at `gva` lies; null where it is not mapped. No fault is taken.
    pub fn private(&self, gva: u64) -> *mut u8 {
        self.walk(gva, PteFlags::PRESENT)
            .map_or(core::ptr::null_mut(), |gpa| self.phys_to_virt(gpa))
    }

    fn kernel(&self) -> &'static Kernel<Model> {
        let kernel = self.kernel.load(Relaxed);
        assert!(!kernel.is_null(), "the machine was not started");
        // SAFETY: `start` got it as a reference that lives as long as any coroutine runs.
        unsafe { &*kernel }
    }

    fn this(&self) -> &ModelCpu {
        &self.cpus[self.current.load(Relaxed)]
    }

    fn take_one_ipi(&self) -> bool {
        let pending = &self.this().pending;
        let found = BY_PRIORITY
            .into_iter()
            .find(|vector| pending.load(Relaxed) & bit(*vector) != 0);
        let Some(vector) = found else {
            return false;
        };
        pending.fetch_and(!bit(vector), Relaxed);
        self.kernel().interrupt(vector);
        true
    }

    fn take_ipis(&self) -> bool {
        let mut any = false;
        while self.take_one_ipi() {
            any = true;
        }
        any
    }

    fn words(&self, gpa: u64) -> &[AtomicU64; ENTRIES_PER_TABLE] {
        assert!(gpa.is_multiple_of(PAGE_SIZE));
        // SAFETY: a whole frame of the arena, page aligned, accessed by atomic words.
        unsafe { &*self.phys_to_virt(gpa).cast() }
    }

    /// The GPA for `gva` in the loaded tables where its leaf entry has `wanted`; else the fault's bits.
    fn walk(&self, gva: u64, wanted: PteFlags) -> Result<u64, u64> {
        let mut table = self.this().root.load(Relaxed);
        for level in (1..=4u8).rev() {
            let entry = Pte(self.words(table)[index(gva, level)].load(Relaxed));
            if !entry.is_present() {
                return Err(0);
            }
            if !entry.flags().contains(wanted) {
                return Err(fault::PRESENT);
            }
            if entry.is_leaf(level) {
                return Ok(entry.leaf_address(level) | (gva & (level_size(level) - 1)));
            }
            table = entry.address();
        }
        unreachable!("a present entry of level 1 is a leaf")
    }

    /// A user access of the kernel, page by page: `access` gets the place and the part of the buffer.
    fn user_copy(
        &self,
        gva: u64,
        len: usize,
        write: bool,
        mut access: impl FnMut(*mut u8, core::ops::Range<usize>),
    ) -> Result<(), UserFault> {
        let wanted = if write {
            PteFlags::PRESENT | PteFlags::WRITE
        } else {
            PteFlags::PRESENT
        };
        let code = if write { fault::WRITE } else { 0 };
        let mut done = 0;
        while done < len {
            let at = gva + done as u64;
            match self.walk(at, wanted) {
                Ok(gpa) => {
                    let part = (len - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
                    access(self.phys_to_virt(gpa), done..done + part);
                    done += part;
                }
                Err(bits) => {
                    if !self.kernel().kernel_user_fault(at, code | bits) {
                        return Err(UserFault { gva: at });
                    }
                }
            }
        }
        Ok(())
    }
}

impl Arch for Model {
    fn cpu(&self) -> usize {
        self.current.load(Relaxed)
    }
    fn nr_cpus(&self) -> usize {
        self.cpus.len()
    }
    #[inline]
    fn phys_to_virt(&self, gpa: u64) -> *mut u8 {
        assert!(gpa < self.bytes, "guest physical address {gpa:#x}");
        self.dirty[(gpa >> PAGE_SHIFT) as usize].store(1, Relaxed);
        self.memory.load(Relaxed).wrapping_add(gpa as usize)
    }
    fn zero_frame(&self, gpa: u64) {
        self.fill_frame(gpa, 0);
    }
    fn fill_frame(&self, gpa: u64, word: u64) {
        for cell in self.words(gpa) {
            cell.store(word, Relaxed);
        }
    }
    fn copy_frame(&self, from: u64, to: u64) {
        for (from, to) in self.words(from).iter().zip(self.words(to)) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }
    fn flush_page(&self, _gva: u64) {
        self.this().flushes.fetch_add(1, Relaxed);
    }
    fn flush_all(&self) {
        self.this().flushes.fetch_add(1, Relaxed);
    }
    fn load_root(&self, operand: u64) {
        self.this().root.store(operand, Relaxed);
    }
    fn current_root(&self) -> u64 {
        self.this().root.load(Relaxed)
    }
    /// There is no TLB but the soft one, which has PCIDs of its own.
    fn has_pcid(&self) -> bool {
        false
    }
    fn disk_submit(&self, gpa: u64) {
        let submitted = (self.current.load(Relaxed), gpa);
        self.submitted.0.borrow_mut().push(submitted);
        // As for an IPI: when it is done is a choice.
        self.channel().budget.store(1, Relaxed);
    }
    fn send_ipi(&self, targets: CpuMask, ipi: Ipi) {
        for (cpu, state) in self.cpus.iter().enumerate() {
            if targets & (1 << cpu) != 0 {
                state.in_flight.fetch_or(bit(ipi as u8), Relaxed);
            }
        }
        // Whoever chooses the schedule is asked at the next point: there is a new choice.
        self.channel().budget.store(1, Relaxed);
    }
    fn relax(&self) {
        self.take_ipis();
    }
    fn wait_for_interrupt(&self) {
        while !self.take_ipis() {
            self.contexts.pause(Pause::Halted);
        }
    }
    fn copy_from_user(&self, dst: &mut [u8], gva: u64) -> Result<(), UserFault> {
        self.user_copy(gva, dst.len(), false, |place, part| {
            // SAFETY: `walk` gave a place in the arena with at least that many bytes to the page's end.
            let source = unsafe { core::slice::from_raw_parts(place, part.len()) };
            dst[part].copy_from_slice(source);
        })
    }
    fn copy_to_user(&self, gva: u64, src: &[u8]) -> Result<(), UserFault> {
        self.user_copy(gva, src.len(), true, |place, part| {
            // SAFETY: as above; no reference to user memory outlives a call.
            unsafe {
                core::ptr::copy_nonoverlapping(src[part.clone()].as_ptr(), place, part.len());
            };
        })
    }
    fn prepare_stack(&self, _stack: *mut u8, _bytes: usize, frame: &UserFrame) -> u64 {
        let (kernel, program, mut frame) = (self.kernel(), self.program, *frame);
        let context = self.contexts.add(move || {
            kernel.task_started();
            kernel.arch.contexts.set_user_frame(&raw mut frame);
            kernel.arch.user_boundary(&mut frame);
            program(kernel);
            panic!("a program has returned");
        });
        context as u64 + 1
    }
    unsafe fn switch(&self, from: &AtomicU64, to: u64) {
        let cpu = self.current.load(Relaxed);
        from.store(self.contexts.on(cpu) as u64 + 1, Relaxed);
        self.contexts.pause(Pause::Switch(to as usize - 1));
    }
    fn set_kernel_stack(&self, _top: u64) {}
    fn channel(&self) -> &Control {
        let gpa = CHANNEL_GPA + self.current.load(Relaxed) as u64 * CHANNEL_STRIDE;
        // SAFETY: a page of the arena, of atomics.
        unsafe {
            &*self
                .memory
                .load(Relaxed)
                .add(gpa as usize)
                .cast::<Control>()
        }
    }
    fn write_event(&self, _slot: usize, event: &Event) {
        self.events.0.borrow_mut().push(*event);
    }
    fn doorbell(&self, reason: Doorbell) {
        #[cfg(test)]
        if self.contexts.idle() {
            return self.play(reason);
        }
        self.contexts.pause(Pause::Doorbell(reason));
    }
    fn tsc(&self) -> u64 {
        self.clock.fetch_add(1, Relaxed)
    }
    fn console(&self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        self.console.0.borrow_mut().push_str(&text);
    }
    fn exit(&self, status: u32) -> ! {
        loop {
            self.contexts.pause(Pause::Exited(status));
        }
    }
}

/// Pages of the root object and of the channels, which the kernel reaches by references that it keeps:
/// they always count as written.
pub fn always_dirty(root: u64, cpus: usize) -> impl Iterator<Item = u64> {
    let pages = |start: u64, bytes: u64| {
        let first = start & !(PAGE_SIZE - 1);
        (first..start + bytes).step_by(PAGE_SIZE as usize)
    };
    let channels =
        (0..cpus as u64).flat_map(move |cpu| pages(CHANNEL_GPA + cpu * CHANNEL_STRIDE, PAGE_SIZE));
    pages(root, size_of::<KernelRoot>() as u64).chain(channels)
}
