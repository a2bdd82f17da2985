//! A machine for the scheduler's tests, with CPUs that really run at once: every context (a task's
//! kernel stack, a CPU's idle loop) is a thread of the host, and a context switch passes the CPU from
//! one to the other. "Stack pointers" are numbers of contexts. A program is a closure; the
//! instruction pointer is its number, so that a clone can start another one.
//!
//! It exists beside the model (`arch::model`), on which the MM tests run and schedules are explored,
//! for what that cannot show by construction: the model runs one CPU at a time and switches only at
//! scheduling points, so it never executes two instructions at once, and never sees a missing barrier, a
//! load and a store that should have been one locked instruction, or a race in a stretch without a point. Here
//! real cores and the host's memory model decide, and nothing is replayable.
//!
//! Each CPU has a TLB that keeps every translation of a program's access until it is flushed. The kernel's
//! accesses to user memory walk the page tables without a look at U, as at CPL 0 without SMAP. IPIs are taken where the kernel allows it,
//! and before each user access and system call.
#![allow(unsafe_code, reason = "a machine of host threads")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use abi::channel::{Control, Doorbell, Event};
use abi::disk::{DiskOp, DiskStatus, SECTOR_BYTES};
use abi::layout::PAGE_SIZE;
use abi::objects::UserFrame;
use abi::pte::{Pte, PteFlags, fault, index};
use abi::syscall::{Errno, decode, nr};

use crate::Kernel;
use crate::arch::{Arch, CpuMask, Ipi, UserFault};
use crate::mm::Field;

/// Bytes of guest memory.
pub(crate) const MEMORY: u64 = 16 << 20;
/// Longest that a run may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every word of the disk.
pub(crate) const ON_DISK: u32 = 0xd15c_d15c;
/// Where the swap area begins.
const SWAP_SECTOR: u64 = 1024;
/// Where no swap area of a test comes to.
const SWAP_END: u64 = 1 << 16;
/// A sector that cannot be read or written.
pub(crate) const BAD_SECTOR: u64 = 1 << 20;

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    static CONTEXT: Cell<u64> = const { Cell::new(0) };
}

/// Unwinds a context whose machine has ended.
struct Ended;

/// What a program of a test is: its result is the exit code of its task.
pub(crate) type Program = Box<dyn Fn(&mut User<'_>) -> u64 + Send + Sync>;

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: u32,
    pub(crate) console: String,
    pub(crate) doorbells: Vec<Doorbell>,
}

#[derive(Default)]
struct State {
    outcome: Option<Result<u32, String>>,
    /// CPU that each context was given, by number of the context less one.
    given: Vec<Option<usize>>,
    /// Vectors, by CPU.
    pending: Vec<Vec<u8>>,
    /// Pages of the swap area, by their first sectors.
    swapped: HashMap<u64, Vec<u64>>,
    console: Vec<u8>,
    doorbells: Vec<Doorbell>,
}

/// See the module.
pub(crate) struct Machine {
    memory: *mut u8,
    nr_cpus: usize,
    roots: Vec<AtomicU64>,
    /// By CPU and page: where it is, and whether it may be written.
    tlbs: Vec<Mutex<HashMap<u64, (u64, bool)>>>,
    channels: *mut u8,
    ticks: AtomicU64,
    kernel: OnceLock<Weak<Kernel<Machine>>>,
    programs: Vec<Program>,
    state: Mutex<State>,
    changed: Condvar,
}

// SAFETY: the two pointers own memory that is shared as a machine's is: the kernel's objects are
// atomics, its other accesses are to frames that one CPU owns, and programs' accesses are atomic.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

const fn layout(bytes: u64) -> Layout {
    match Layout::from_size_align(bytes as usize, PAGE_SIZE as usize) {
        Ok(layout) => layout,
        Err(_) => panic!("page-aligned layouts exist"),
    }
}

impl Machine {
    /// A machine with zeroed memory. Program 0 is the first process's.
    pub(crate) fn new(nr_cpus: usize, programs: Vec<Program>) -> Self {
        // SAFETY: the layouts are not empty. All zeroes is a valid `Control`.
        let (memory, channels) = unsafe {
            (
                alloc_zeroed(layout(MEMORY)),
                alloc_zeroed(layout(nr_cpus as u64 * PAGE_SIZE)),
            )
        };
        assert!(!memory.is_null() && !channels.is_null(), "no memory");
        CPU.set(0);
        Self {
            memory,
            nr_cpus,
            roots: (0..nr_cpus).map(|_| AtomicU64::new(0)).collect(),
            tlbs: (0..nr_cpus).map(|_| Mutex::default()).collect(),
            channels,
            ticks: AtomicU64::new(0),
            kernel: OnceLock::new(),
            programs,
            state: Mutex::new(State {
                pending: vec![Vec::new(); nr_cpus],
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    /// Interrupts of `cpu` that it has not taken; takes them.
    fn take_pending(&self, cpu: usize) -> Vec<u8> {
        std::mem::take(&mut self.state().pending[cpu])
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives a value; unwinds where the machine ends first.
    fn wait_until<T>(&self, mut done: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.state();
        loop {
            if state.outcome.is_some() {
                drop(state);
                resume_unwind(Box::new(Ended));
            }
            if let Some(value) = done(&mut state) {
                return value;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, outcome: Result<u32, String>) {
        self.state().outcome.get_or_insert(outcome);
        self.changed.notify_all();
    }

    fn new_context(&self) -> u64 {
        let mut state = self.state();
        state.given.push(None);
        state.given.len() as u64
    }

    /// Runs `body` as context `number`; a panic in it ends the machine.
    fn start_context(
        kernel: &Arc<Kernel<Machine>>,
        number: u64,
        body: impl FnOnce(&Kernel<Machine>) + Send + 'static,
    ) {
        let kernel = kernel.clone();
        std::thread::spawn(move || {
            let machine = &kernel.arch;
            let result = catch_unwind(AssertUnwindSafe(|| {
                CONTEXT.set(number);
                machine.receive_cpu(number);
                body(&kernel);
            }));
            if let Err(payload) = result
                && !payload.is::<Ended>()
            {
                let text = payload
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
                machine.end(Err(text.unwrap_or_default()));
            }
        });
    }

    fn receive_cpu(&self, number: u64) {
        let cpu = self.wait_until(|state| state.given[number as usize - 1].take());
        CPU.set(cpu);
    }

    fn give_cpu(&self, to: u64, cpu: usize) {
        let before = self.state().given[to as usize - 1].replace(cpu);
        assert_eq!(before, None, "context {to} resumed twice");
        self.changed.notify_all();
    }

    /// Takes the IPIs that are pending here.
    fn take_ipis(&self) {
        if let Some(kernel) = self.kernel.get().and_then(Weak::upgrade) {
            for vector in self.take_pending(self.cpu()) {
                kernel.interrupt(vector);
            }
        }
    }

    /// Moves a page from or to the swap area, for the request at address `request`, and interrupts `cpu`.
    fn move_page(&self, cpu: usize, request: usize, (sector, gpa): (u64, u64)) {
        std::thread::yield_now();
        // SAFETY: guest memory, where the kernel has put a request, which is made of atomics.
        let request = unsafe { &*(request as *const abi::disk::DiskRequest) };
        let words = (0..PAGE_SIZE).step_by(8).map(|offset| {
            // SAFETY: an aligned word of guest memory, atomic as everything there.
            unsafe { &*self.phys_to_virt(gpa + offset).cast::<AtomicU64>() }
        });
        if request.op.load(SeqCst) == DiskOp::Write as u32 {
            let page = words.map(|word| word.load(SeqCst)).collect();
            self.state().swapped.insert(sector, page);
        } else {
            let page = self.state().swapped.get(&sector).cloned();
            for (word, value) in words.zip(page.expect("what is read was written")) {
                word.store(value, SeqCst);
            }
        }
        request.status.store(DiskStatus::Done as u32, SeqCst);
        self.state().pending[cpu].push(abi::disk::VECTOR);
        self.changed.notify_all();
    }

    /// Slots of the swap area that were written.
    pub(crate) fn swapped_pages(&self) -> usize {
        self.state().swapped.len()
    }

    /// Where user address `gva` is, for an access of the kernel (`privilege` empty) or of a program
    /// ([`PteFlags::USER`]); or the error code of the page fault.
    fn translate(&self, gva: u64, write: bool, privilege: PteFlags) -> Result<*mut u8, u64> {
        let mut wanted = PteFlags::PRESENT | privilege;
        if write {
            wanted |= PteFlags::WRITE;
        }
        let write_bit = if write { fault::WRITE } else { 0 };
        let mut table = self.current_root();
        for level in (1..=4u8).rev() {
            let slot = self.phys_to_virt(table + 8 * index(gva, level) as u64);
            // SAFETY: `table` is a page of guest memory, read as the atomic words it is made of.
            let entry = unsafe { &*slot.cast::<AtomicU64>() };
            let pte = Pte(entry.load(SeqCst));
            if !pte.is_present() {
                return Err(write_bit);
            }
            if !pte.flags().contains(wanted) {
                return Err(write_bit | fault::PRESENT);
            }
            if level == 1 && privilege.contains(PteFlags::USER) {
                // As a processor does, if the entry is still the same; else the access faults, and is made again.
                let dirty = if write {
                    PteFlags::DIRTY
                } else {
                    PteFlags::empty()
                };
                let used = pte.with(PteFlags::ACCESSED | dirty);
                let marked = entry.compare_exchange(pte.0, used.0, SeqCst, SeqCst);
                marked.map_err(|_| write_bit)?;
            }
            table = pte.address();
        }
        Ok(self.phys_to_virt(table + gva % PAGE_SIZE))
    }

    /// Where `gva` is for a program's access: what this CPU has cached, or a walk, which it caches. A
    /// fault removes what is cached (SDM vol. 3A, 5.10.4.1).
    fn translate_cached(&self, gva: u64, write: bool) -> Result<*mut u8, u64> {
        let page = gva / PAGE_SIZE;
        let cached = self.tlb().get(&page).copied();
        if let Some((frame, writable)) = cached
            && (writable || !write)
        {
            return Ok(self.phys_to_virt(frame + gva % PAGE_SIZE));
        }
        self.tlb().remove(&page);
        let place = self.translate(gva, write, PteFlags::USER)?;
        let gpa = place as u64 - self.memory as u64;
        self.tlb().insert(page, (gpa - gpa % PAGE_SIZE, write));
        Ok(place)
    }

    /// The TLB of the CPU that executes this.
    fn tlb(&self) -> MutexGuard<'_, HashMap<u64, (u64, bool)>> {
        self.tlbs[self.cpu()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A user access of the kernel: `access` gets the byte's index and place.
    fn kernel_access(
        &self,
        gva: u64,
        len: usize,
        write: bool,
        mut access: impl FnMut(usize, &AtomicU8),
    ) -> Result<(), UserFault> {
        let kernel = self.kernel.get().and_then(Weak::upgrade);
        for i in 0..len {
            let gva = gva + i as u64;
            let place = loop {
                match self.translate(gva, write, PteFlags::empty()) {
                    Ok(place) => break place,
                    Err(error) => {
                        let kernel = kernel.as_ref().ok_or(UserFault { gva })?;
                        if !kernel.kernel_user_fault(gva, error) {
                            return Err(UserFault { gva });
                        }
                    }
                }
            };
            // SAFETY: a byte of guest memory; programs' memory is only touched atomically.
            access(i, unsafe { &*place.cast::<AtomicU8>() });
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with these layouts.
        unsafe {
            dealloc(self.memory, layout(MEMORY));
            dealloc(self.channels, layout(self.nr_cpus as u64 * PAGE_SIZE));
        }
    }
}

/// Lets `kernel` find itself, `start`s its first process and runs all CPUs until the machine ends.
///
/// # Panics
/// Where the kernel does, or where it hangs.
pub(crate) fn run(
    kernel: Kernel<Machine>,
    start: impl FnOnce(&Kernel<Machine>),
) -> (Arc<Kernel<Machine>>, Outcome) {
    let kernel = Arc::new(kernel);
    let machine = &kernel.arch;
    machine
        .kernel
        .set(Arc::downgrade(&kernel))
        .expect("a machine runs once");
    start(&kernel);
    for cpu in 0..machine.nr_cpus {
        let number = machine.new_context();
        Machine::start_context(&kernel, number, |kernel| kernel.run_cpu());
        machine.give_cpu(number, cpu);
    }
    let (mut state, wait) = machine
        .changed
        .wait_timeout_while(machine.state(), PATIENCE, |state| state.outcome.is_none())
        .unwrap_or_else(PoisonError::into_inner);
    assert!(
        !wait.timed_out(),
        "the machine hangs: {}",
        standstill(&kernel)
    );
    let outcome = match state.outcome.clone().expect("no longer none") {
        Ok(status) => Outcome {
            status,
            console: String::from_utf8_lossy(&state.console).into_owned(),
            doorbells: std::mem::take(&mut state.doorbells),
        },
        Err(panic) => panic!("the kernel panicked: {panic}"),
    };
    drop(state);
    (kernel, outcome)
}

/// What every task does, and how much memory is free.
fn standstill(kernel: &Kernel<Machine>) -> String {
    let tasks = kernel.tasks().map(|task| kernel.obj(task));
    let tasks = tasks.map(|task| (task.id.get(), task.state.get(), task.waits_for.get()));
    let tasks: Vec<_> = tasks.collect();
    let (root, failures) = (kernel.root(), kernel.root().kswapd.failures.get());
    let free = root.free_frames.get();
    std::format!("tasks {tasks:?}, {free} free frames, {failures} failures")
}

impl Arch for Machine {
    fn cpu(&self) -> usize {
        CPU.get()
    }
    fn nr_cpus(&self) -> usize {
        self.nr_cpus
    }
    fn phys_to_virt(&self, gpa: u64) -> *mut u8 {
        assert!(gpa < MEMORY, "{gpa:#x} is no memory");
        self.memory.wrapping_add(gpa as usize)
    }
    fn zero_frame(&self, gpa: u64) {
        self.fill_frame(gpa, 0);
    }
    fn fill_frame(&self, gpa: u64, word: u64) {
        for offset in (0..PAGE_SIZE).step_by(8) {
            let place = self.phys_to_virt(gpa + offset).cast::<AtomicU64>();
            // SAFETY: an aligned word of guest memory, atomic as everything there.
            unsafe { &*place }.store(word, Relaxed);
        }
    }
    fn copy_frame(&self, from: u64, to: u64) {
        for offset in (0..PAGE_SIZE).step_by(8) {
            let [from, to] = [from, to].map(|gpa| self.phys_to_virt(gpa + offset));
            // SAFETY: as in `fill_frame`.
            let [from, to] = [from, to].map(|place| unsafe { &*place.cast::<AtomicU64>() });
            to.store(from.load(Relaxed), Relaxed);
        }
    }
    fn flush_page(&self, gva: u64) {
        self.tlb().remove(&(gva / PAGE_SIZE));
    }
    fn flush_all(&self) {
        self.tlb().clear();
    }
    fn load_root(&self, operand: u64) {
        self.flush_all();
        self.roots[self.cpu()].store(operand, SeqCst);
    }
    fn has_pcid(&self) -> bool {
        false
    }
    fn current_root(&self) -> u64 {
        self.roots[self.cpu()].load(SeqCst)
    }
    /// A disk that is done at once: it holds [`ON_DISK`] everywhere, keeps nothing, and fails at [`BAD_SECTOR`]. But
    /// pages of the swap area are kept, and moved in their own time.
    fn disk_submit(&self, gpa: u64) {
        let place = self.phys_to_virt(gpa).cast::<abi::disk::DiskRequest>();
        // SAFETY: guest memory, where the kernel has put a request, which is made of atomics.
        let request = unsafe { &*place };
        let [sector, gpa, bytes] =
            [&request.sector, &request.gpa, &request.bytes].map(|word| word.load(SeqCst));
        if (SWAP_SECTOR..SWAP_END).contains(&sector) && bytes == PAGE_SIZE {
            let (kernel, cpu) = (self.kernel.get().and_then(Weak::upgrade), self.cpu());
            let kernel = kernel.expect("the kernel runs");
            let request = place as usize;
            std::thread::spawn(move || kernel.arch.move_page(cpu, request, (sector, gpa)));
            return;
        }
        let status = if sector > 1 << 32 {
            DiskStatus::Invalid
        } else if (sector..sector + bytes / SECTOR_BYTES).contains(&BAD_SECTOR) {
            DiskStatus::Error
        } else {
            DiskStatus::Done
        };
        if status == DiskStatus::Done && request.op.load(SeqCst) == DiskOp::Read as u32 {
            for offset in (0..bytes).step_by(4) {
                let place = self.phys_to_virt(gpa + offset).cast::<AtomicU32>();
                // SAFETY: an aligned half word of guest memory, atomic as everything there.
                unsafe { &*place }.store(ON_DISK, SeqCst);
            }
        }
        request.status.store(status as u32, SeqCst);
    }
    fn send_ipi(&self, targets: CpuMask, ipi: Ipi) {
        let mut state = self.state();
        for cpu in (0..self.nr_cpus).filter(|cpu| targets & (1 << cpu) != 0) {
            assert_ne!(cpu, self.cpu(), "an IPI to its sender");
            state.pending[cpu].push(ipi as u8);
        }
        drop(state);
        self.changed.notify_all();
    }
    fn relax(&self) {
        self.take_ipis();
        if self.state().outcome.is_some() {
            resume_unwind(Box::new(Ended));
        }
        std::thread::yield_now();
    }
    fn wait_for_interrupt(&self) {
        let cpu = self.cpu();
        self.wait_until(|state| (!state.pending[cpu].is_empty()).then_some(()));
        self.take_ipis();
    }
    fn copy_from_user(&self, dst: &mut [u8], gva: u64) -> Result<(), UserFault> {
        self.kernel_access(gva, dst.len(), false, |i, byte| dst[i] = byte.load(SeqCst))
    }
    fn copy_to_user(&self, gva: u64, src: &[u8]) -> Result<(), UserFault> {
        self.kernel_access(gva, src.len(), true, |i, byte| byte.store(src[i], SeqCst))
    }
    fn prepare_stack(&self, _stack: *mut u8, _bytes: usize, frame: &UserFrame) -> u64 {
        let number = self.new_context();
        let Some(kernel) = self.kernel.get().and_then(Weak::upgrade) else {
            return number;
        };
        let frame = *frame;
        Self::start_context(&kernel, number, move |kernel| {
            kernel.task_started();
            let mut user = User { kernel, frame };
            kernel.return_to_user(&mut user.frame);
            let program = &kernel.arch.programs[user.frame.rip as usize];
            let code = program(&mut user);
            let _ = user.call(nr::EXIT, [code, 0, 0, 0]);
        });
        number
    }
    unsafe fn switch(&self, from: &AtomicU64, to: u64) {
        let number = CONTEXT.get();
        from.store(number, SeqCst);
        self.give_cpu(to, self.cpu());
        self.receive_cpu(number);
    }
    fn set_kernel_stack(&self, _top: u64) {}
    fn channel(&self) -> &Control {
        let page = self.channels.wrapping_add(self.cpu() * PAGE_SIZE as usize);
        // SAFETY: one page per CPU was allocated, zeroed; a `Control` is a page of atomics.
        unsafe { &*page.cast::<Control>() }
    }
    fn write_event(&self, _slot: usize, _event: &Event) {}
    fn doorbell(&self, reason: Doorbell) {
        self.state().doorbells.push(reason);
    }
    fn tsc(&self) -> u64 {
        self.ticks.fetch_add(1, Relaxed)
    }
    fn console(&self, bytes: &[u8]) {
        self.state().console.extend_from_slice(bytes);
    }
    fn exit(&self, status: u32) -> ! {
        self.end(Ok(status));
        resume_unwind(Box::new(Ended));
    }
}

/// CPL 3 of one task.
pub(crate) struct User<'k> {
    pub(crate) kernel: &'k Kernel<Machine>,
    frame: UserFrame,
}

impl User<'_> {
    /// A system call.
    pub(crate) fn call(&mut self, nr: u64, args: [u64; 4]) -> Result<u64, Errno> {
        let [a, b, c, d] = args;
        self.call6(nr, [a, b, c, d, u64::MAX, 0])
    }

    /// A system call of more arguments.
    pub(crate) fn call6(&mut self, nr: u64, args: [u64; 6]) -> Result<u64, Errno> {
        self.take_ipis();
        self.frame.rax = nr;
        [
            self.frame.rdi,
            self.frame.rsi,
            self.frame.rdx,
            self.frame.r10,
            self.frame.r8,
            self.frame.r9,
        ] = args;
        self.kernel.syscall(&mut self.frame);
        self.kernel.return_to_user(&mut self.frame);
        decode(self.frame.rax)
    }

    /// clone whose child runs program `child`.
    pub(crate) fn clone(&mut self, flags: u64, tid: u64, child: u64) -> Result<u64, Errno> {
        let rip = std::mem::replace(&mut self.frame.rip, child);
        let result = self.call(nr::CLONE, [flags, 0, tid, tid]);
        self.frame.rip = rip;
        result
    }

    /// The word at `gva`, which is a multiple of 4.
    pub(crate) fn load(&mut self, gva: u64) -> u32 {
        self.try_load(gva).expect("no fixup is set")
    }

    /// Writes the word at `gva`.
    pub(crate) fn store(&mut self, gva: u64, value: u32) {
        self.try_store(gva, value).expect("no fixup is set");
    }

    /// The word at `gva`; `None` where its fault led to the program's fixup.
    pub(crate) fn try_load(&mut self, gva: u64) -> Option<u32> {
        self.word(gva, false).map(|word| word.load(SeqCst))
    }

    /// Writes the word at `gva`; `None` where its fault led to the program's fixup.
    pub(crate) fn try_store(&mut self, gva: u64, value: u32) -> Option<()> {
        self.word(gva, true).map(|word| word.store(value, SeqCst))
    }

    /// Adds to the word at `gva`; returns what it was.
    pub(crate) fn add(&mut self, gva: u64, value: u32) -> u32 {
        let word = self.word(gva, true).expect("no fixup is set");
        word.fetch_add(value, SeqCst)
    }

    /// Takes an exception.
    pub(crate) fn exception(&mut self, vector: u64) {
        self.frame.vector = vector;
        self.kernel.exception(&mut self.frame);
        self.kernel.return_to_user(&mut self.frame);
    }

    /// The instruction pointer: the number of the program, or where a fixup has led.
    pub(crate) fn rip(&self) -> u64 {
        self.frame.rip
    }

    /// Takes pending IPIs, as between any two instructions.
    pub(crate) fn take_ipis(&mut self) {
        if self.kernel.arch.state().outcome.is_some() {
            resume_unwind(Box::new(Ended));
        }
        self.kernel.arch.take_ipis();
        self.kernel.return_to_user(&mut self.frame);
    }

    fn word(&mut self, gva: u64, write: bool) -> Option<&AtomicU32> {
        assert_eq!(gva % 4, 0);
        self.take_ipis();
        let rip = self.frame.rip;
        loop {
            match self.kernel.arch.translate_cached(gva, write) {
                // SAFETY: an aligned word of guest memory, only touched atomically.
                Ok(place) => return Some(unsafe { &*place.cast::<AtomicU32>() }),
                Err(error) => {
                    self.kernel
                        .page_fault(&mut self.frame, gva, error | fault::USER);
                    self.kernel.return_to_user(&mut self.frame);
                }
            }
            if self.frame.rip != rip {
                self.frame.rip = rip;
                return None;
            }
        }
    }
}
