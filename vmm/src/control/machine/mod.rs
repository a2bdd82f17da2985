//! The machine: made, run, paused, and why it stopped. What can be set and read meanwhile is in
//! [`panel`], how it is saved and put back in [`state`].

mod panel;
mod state;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use abi::channel::Doorbell;
use abi::layout::MAX_CPUS;
use serde::Serialize;

use super::board::{Board, Message};
use super::channel::Channel;
use super::config::MachineConfig;
use super::console::Console;
use super::error::MachineError;
use super::io::{IoThread, RunNumber, Watchdog};
use super::stop::{Crash, CrashCause, Stop};
use crate::boot::{self, Boot, BootSpec};
use crate::kvm::vcpu::{self, Notice, State, Step, Vcpu, VcpuError, VcpuSpec};
use crate::kvm::{host, vm};
use crate::memory::GuestRam;
use crate::snapshot::Snapshot;

pub use state::ResetTimings;

/// Longest sleep of the controller without a look at its flags.
const TICK: Duration = Duration::from_secs(1);

/// How long the parts of a machine's life took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// Reserving and mapping guest memory.
    pub memory: Duration,
    /// Loading the images and building the page tables.
    pub load: Duration,
    /// Creating the VM.
    pub create_vm: Duration,
    /// Creating the vCPUs and their threads.
    pub create_vcpus: Duration,
    /// From the first resume to the first user instruction, if that was reached.
    pub first_user: Option<Duration>,
}

/// How long it took to pause or resume every vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PauseTimings {
    /// From the first request to the last reply.
    pub total: Duration,
    /// From the first request to each vCPU's reply, in order of the vCPUs that were asked.
    pub each: Vec<Duration>,
}

/// Stops a machine from another thread, or from a signal handler's thread.
#[derive(Clone, Debug)]
pub struct InterruptHandle {
    flag: Arc<AtomicBool>,
    messages: Sender<Message>,
}

impl InterruptHandle {
    /// Makes the current or next [`Machine::run_until`] return [`Stop::Interrupted`].
    pub fn interrupt(&self) {
        self.flag.store(true, Ordering::Relaxed);
        // The message wakes the controller; the flag is what counts.
        let _ = self.messages.send(Message::Interrupted);
    }
}

/// A machine. Between two calls every vCPU is paused, between two instructions.
///
/// ```no_run
/// use vmm::control::{Machine, MachineConfig, Stop};
///
/// let mut machine = Machine::new(MachineConfig::default())?;
/// match machine.run_until(None)? {
///     Stop::Exited { status } => println!("status {status}"),
///     other => println!("{other:?}"),
/// }
/// # Ok::<(), vmm::control::MachineError>(())
/// ```
pub struct Machine {
    /// First, so that the vCPU threads are gone before anything that they use.
    vcpus: Vec<Vcpu>,
    _io: IoThread,
    vm: vm::Vm,
    board: Arc<Board>,
    serialised: bool,
    ram: GuestRam,
    console: Console,
    kernel: Cow<'static, [u8]>,
    user: Vec<u8>,
    watchdog: Duration,
    messages: Receiver<Message>,
    /// Messages that nobody has been told of, in order.
    backlog: VecDeque<Message>,
    interrupt: InterruptHandle,
    traps: [u64; 4],
    run: RunNumber,
    runs: u64,
    first_resume: Option<Instant>,
    timings: Timings,
    tsc_khz: Option<u32>,
    ended: Option<Stop>,
    base: Option<state::Base>,
}

/// The state in which a machine starts.
enum Start<'a> {
    Boot(&'a Boot),
    Snapshot(&'a Snapshot),
}

impl Machine {
    /// A machine with everything loaded, its vCPUs paused before the kernel's first instruction.
    ///
    /// # Errors
    /// A configuration that no machine can have, or a host that cannot do it.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        Self::with_user_image(config, boot::user_image())
    }

    /// The same with other user programs.
    ///
    /// # Errors
    /// As [`Machine::new`].
    #[allow(clippy::needless_pass_by_value)] // a machine is made of its configuration
    pub fn with_user_image(config: MachineConfig, user: &[u8]) -> Result<Self, MachineError> {
        if config.vcpus == 0 || config.vcpus as usize > MAX_CPUS {
            return Err(MachineError::bad_vcpus(config.vcpus));
        }
        let mut timings = Timings::default();
        let mut clock = Clock(Instant::now());
        let ram = GuestRam::new(config.memory_bytes)?;
        timings.memory = clock.lap();

        let kernel = config.kernel.bytes()?;
        let spec = BootSpec {
            kernel: &kernel,
            user,
            program: &config.program,
            cpus: config.vcpus,
            interrupts: config.interrupts,
            cmdline: &config.cmdline,
        };
        let boot = boot::load(&ram, &spec)?;
        for vcpu in 0..config.vcpus as usize {
            let channel = Channel::new(&ram, vcpu);
            channel.set_budget(u64::MAX);
            channel.set_event_mask(config.events);
            channel.set_ring_exits(config.serialised);
        }
        timings.load = clock.lap();
        Self::assemble(&config, (kernel, user), ram, timings, &Start::Boot(&boot))
    }

    /// A machine around memory that is as it starts; `images` are the ELF files that are in it.
    fn assemble(
        config: &MachineConfig,
        images: (Cow<'static, [u8]>, &[u8]),
        ram: GuestRam,
        mut timings: Timings,
        start: &Start<'_>,
    ) -> Result<Self, MachineError> {
        let mut clock = Clock(Instant::now());
        let vm = vm::Vm::new(vm::open()?, &ram, config.interrupts)?;
        if config.needs_pcid() && !vm.has_pcid()? {
            return Err(MachineError::NoPcid);
        }
        timings.create_vm = clock.lap();

        let io_error = |step| move |source| MachineError::Io { step, source };
        let console = Console::new().map_err(io_error("create the console"))?;
        let (sender, messages) = mpsc::channel();
        let board = Board::new(
            config.vcpus as usize,
            config.interrupts,
            &console,
            config.disk.build(config.vcpus as usize),
            &ram,
            config.serialised,
            sender.clone(),
        );
        let board = board.wired(vm.wire()).disturbed(&config.disturb, &ram);
        let board = Arc::new(board.map_err(io_error("start the wire thread"))?);
        let host_cpus = if config.pin {
            host::allowed_cpus()
        } else {
            Vec::new()
        };
        let mut vcpus = Vec::new();
        let mut tsc_khz = None;
        for cpu in 0..config.vcpus {
            let index = cpu as usize;
            let fd = vm.create_vcpu(cpu, config.vcpus)?;
            if let Start::Boot(boot) = start {
                vm.start_vcpu(&fd, cpu, boot)?;
            }
            tsc_khz = fd.get_tsc_khz().ok();
            let mut vcpu = Vcpu::new(VcpuSpec {
                index,
                fd,
                ram: ram.clone(),
                interrupts: config.interrupts,
                platform: board.clone(),
                kick: board.kick(index),
                pin: host_cpus.get(index % host_cpus.len().max(1)).copied(),
            });
            vcpu.start()?;
            if let Start::Snapshot(snapshot) = start {
                vcpu.request_restore(Arc::clone(&snapshot.vcpus[index]))?;
                vcpu.wait(Step::Restore)?;
            }
            vcpus.push(vcpu);
        }
        if let Start::Snapshot(snapshot) = start {
            board.restore(&snapshot.board);
        }
        for vcpu in 0..vcpus.len() {
            let traps = board.disturber().map(|disturber| disturber.traps(vcpu));
            Channel::new(&ram, vcpu).set_traps(traps.unwrap_or_default());
        }
        let run = RunNumber::default();
        let io = IoThread::start(
            console.clone(),
            Watchdog {
                ram: ram.clone(),
                vcpus: vcpus.iter().map(|vcpu| vcpu.vitals().clone()).collect(),
                run: run.clone(),
                patience: config.watchdog,
                messages: sender.clone(),
            },
        )
        .map_err(io_error("start the I/O thread"))?;
        timings.create_vcpus = clock.lap();

        Ok(Self {
            vcpus,
            _io: io,
            vm,
            board,
            serialised: config.serialised,
            ram,
            console,
            kernel: images.0,
            user: images.1.to_vec(),
            watchdog: config.watchdog,
            messages,
            backlog: VecDeque::new(),
            interrupt: InterruptHandle {
                flag: Arc::default(),
                messages: sender,
            },
            traps: [0; 4],
            run,
            runs: 0,
            first_resume: None,
            timings,
            tsc_khz,
            ended: None,
            base: None,
        })
    }

    /// Lets the machine run until something happens or `deadline` is over, and pauses every vCPU.
    ///
    /// Where several vCPUs stop at once, each is told by a call of its own; the machine does not run
    /// on before all were. After a [final](Stop::is_final) stop the same one is returned for ever.
    ///
    /// # Errors
    /// A fault of the host's side; the machine should then be dropped.
    pub fn run_until(&mut self, deadline: Option<Duration>) -> Result<Stop, MachineError> {
        if let Some(stop) = &self.ended {
            return Ok(stop.clone());
        }
        let until = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        let stop = match self.queued_stop()? {
            Some(stop) => stop,
            None => {
                self.resume_all()?;
                let stop = self.wait_for_stop(until);
                // Paused in any case: an error must not leave vCPUs running.
                let paused = self.pause_all();
                let stop = stop?;
                paused?;
                stop
            }
        };
        let stop = self.complete(stop)?;
        if stop.is_final() {
            self.ended = Some(stop.clone());
        }
        Ok(stop)
    }

    /// Lets `vcpu` alone run until it stops or `deadline` is over.
    ///
    /// # Errors
    /// A fault of the host's side; the machine should then be dropped.
    pub fn run_vcpu(
        &mut self,
        vcpu: usize,
        deadline: Option<Duration>,
    ) -> Result<Stop, MachineError> {
        if let Some(stop) = &self.ended {
            return Ok(stop.clone());
        }
        self.absorb()?;
        self.runs += 1;
        self.run.set(self.runs);
        let until = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        self.first_resume.get_or_insert_with(Instant::now);
        self.all(Step::Resume, |handle| {
            handle.index() == vcpu && handle.state() == State::Paused
        })?;
        let stop = self.wait_for_stop(until);
        let paused = self.pause_all();
        let stop = stop?;
        paused?;
        let stop = self.complete(stop)?;
        if stop.is_final() {
            self.ended = Some(stop.clone());
        }
        Ok(stop)
    }

    /// True where an IPI that was sent to `vcpu` is held (serialised machines).
    #[must_use]
    pub fn in_flight(&self, vcpu: usize) -> bool {
        self.board.in_flight(vcpu)
    }
    /// Delivers every IPI that is held for `vcpu`.
    pub fn deliver(&mut self, vcpu: usize) {
        self.board.deliver_held(vcpu);
    }
    /// True where a request of `vcpu` to the disk is under way.
    #[must_use]
    pub fn disk_in_flight(&self, vcpu: usize) -> bool {
        self.board.disk_in_flight(vcpu)
    }
    /// Lets the disk do the oldest request of `vcpu`.
    pub fn disk_complete(&self, vcpu: usize) {
        self.board.disk_complete(vcpu);
    }
    /// True where `vcpu` takes an interrupt as soon as it may.
    #[must_use]
    pub fn pending(&self, vcpu: usize) -> bool {
        self.board.pending(vcpu)
    }

    /// Resumes every vCPU but those whose stop has not been told yet.
    ///
    /// # Errors
    /// A vCPU thread that does not obey.
    pub fn resume_all(&mut self) -> Result<PauseTimings, MachineError> {
        self.absorb()?;
        let waiting: Vec<usize> = self.backlog.iter().filter_map(told_by).collect();
        self.runs += 1;
        self.run.set(self.runs);
        self.first_resume.get_or_insert_with(Instant::now);
        self.all(Step::Resume, |vcpu| {
            vcpu.state() == State::Paused && !waiting.contains(&vcpu.index())
        })
    }

    /// Pauses every vCPU: all are asked before any is waited for. A half-done access completes first.
    ///
    /// # Errors
    /// A vCPU thread that does not obey.
    pub fn pause_all(&mut self) -> Result<PauseTimings, MachineError> {
        self.run.set(0);
        self.all(Step::Pause, |vcpu| vcpu.state() == State::Running)
    }

    fn all(
        &mut self,
        step: Step,
        is_meant: impl Fn(&Vcpu) -> bool,
    ) -> Result<PauseTimings, MachineError> {
        let start = Instant::now();
        let mut each = Vec::new();
        let mut result = Ok(());
        let mut asked = Vec::new();
        for vcpu in &mut self.vcpus {
            if is_meant(vcpu) {
                match vcpu.request(step) {
                    Ok(()) => asked.push(vcpu),
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        // One that fails does not keep the others from being waited for.
        for vcpu in asked {
            result = result.and(vcpu.wait(step));
            each.push(start.elapsed());
        }
        result?;
        Ok(PauseTimings {
            total: start.elapsed(),
            each,
        })
    }

    /// The first stop among what was sent before now.
    fn queued_stop(&mut self) -> Result<Option<Stop>, MachineError> {
        self.absorb()?;
        while let Some(message) = self.backlog.pop_front() {
            if let Some(stop) = self.judge(message) {
                return Ok(Some(stop));
            }
        }
        Ok(None)
    }

    /// Moves what was sent into the backlog, without waiting.
    fn absorb(&mut self) -> Result<(), MachineError> {
        while let Ok(message) = self.messages.try_recv() {
            self.take_in(message)?;
        }
        Ok(())
    }

    fn wait_for_stop(&mut self, until: Option<Instant>) -> Result<Stop, MachineError> {
        loop {
            let left = until.map_or(TICK, |until| {
                until.saturating_duration_since(Instant::now()).min(TICK)
            });
            match self.messages.recv_timeout(left) {
                Ok(message) => self.take_in(message)?,
                Err(RecvTimeoutError::Timeout) => {
                    if until.is_some_and(|until| until <= Instant::now()) {
                        return Ok(Stop::Deadline);
                    }
                }
                // `self.interrupt` holds a sender.
                Err(RecvTimeoutError::Disconnected) => unreachable!("the machine sends to itself"),
            }
            if let Some(stop) = self.queued_stop()? {
                return Ok(stop);
            }
        }
    }

    /// Notes what a message means for its vCPU, and keeps it if somebody must be told.
    fn take_in(&mut self, message: Message) -> Result<(), MachineError> {
        if let Message::Vcpu(Notice { vcpu, at, event }) = &message {
            let handle = &mut self.vcpus[*vcpu];
            if *event == vcpu::Event::ThreadPanic {
                return Err(MachineError::Vcpu(VcpuError::Died {
                    vcpu: *vcpu,
                    state: handle.state(),
                }));
            }
            let was_running = handle.state() == State::Running;
            handle.parked()?;
            if *event == vcpu::Event::Doorbell(Doorbell::FirstUser as u32) {
                if let (None, Some(start)) = (self.timings.first_user, self.first_resume) {
                    self.timings.first_user = Some(at.duration_since(start));
                }
                if self.serialised {
                    self.backlog.push_back(message);
                    return Ok(());
                }
                if was_running {
                    handle.request(Step::Resume)?;
                    handle.wait(Step::Resume)?;
                }
                return Ok(());
            }
        }
        self.backlog.push_back(message);
        Ok(())
    }

    /// The stop that a message stands for, if it still means anything. Snapshots follow later.
    fn judge(&self, message: Message) -> Option<Stop> {
        match message {
            Message::Interrupted => self
                .interrupt
                .flag
                .swap(false, Ordering::Relaxed)
                .then_some(Stop::Interrupted),
            Message::Stalled { run } => {
                let seconds = self.watchdog.as_secs_f64();
                (run == self.runs).then(|| crash(None, CrashCause::NoProgress { seconds }))
            }
            Message::Vcpu(Notice { vcpu, event, .. }) => Some(match event {
                vcpu::Event::Exit(status) => Stop::Exited { status },
                vcpu::Event::Doorbell(value) => self.doorbell(vcpu, value),
                vcpu::Event::Stepped { rip } => Stop::Stepped { vcpu, rip },
                vcpu::Event::Fault(fault) => crash(Some(vcpu), fault.into()),
                vcpu::Event::ThreadPanic => return None,
            }),
        }
    }

    fn doorbell(&self, vcpu: usize, value: u32) -> Stop {
        let channel = Channel::new(&self.ram, vcpu);
        let refuse = |text| crash(Some(vcpu), CrashCause::unexpected(text));
        match Doorbell::from_u32(value) {
            Some(Doorbell::Point) => channel
                .point()
                .map_or_else(refuse, |(point, args)| Stop::Point { vcpu, point, args }),
            Some(Doorbell::Report) => channel
                .report()
                .map_or_else(refuse, |report| Stop::Report { vcpu, report }),
            Some(Doorbell::Panic) => {
                let message = channel.message();
                crash(Some(vcpu), CrashCause::KernelPanic { message })
            }
            Some(Doorbell::RingFull) if channel.ring_exits() => Stop::RingFull { vcpu },
            Some(Doorbell::RingFull) => {
                refuse("the guest waits for a full event ring, which nobody asked for".into())
            }
            Some(Doorbell::FirstUser) if self.serialised => Stop::FirstUser { vcpu },
            Some(Doorbell::FirstUser) | None => refuse(format!(
                "the guest rang the doorbell with {value}, which is no reason"
            )),
        }
    }

    /// Adds what can only be read while every vCPU is paused.
    fn complete(&self, stop: Stop) -> Result<Stop, MachineError> {
        let Stop::Crashed(crash) = stop else {
            return Ok(stop);
        };
        let snapshots = (0..self.vcpus.len())
            .map(|vcpu| self.vcpu_state(vcpu))
            .collect::<Result<_, _>>()?;
        Ok(Stop::Crashed(Crash { snapshots, ..crash }))
    }
}

/// The vCPU that a message is from.
fn told_by(message: &Message) -> Option<usize> {
    match message {
        Message::Vcpu(notice) => Some(notice.vcpu),
        Message::Stalled { .. } | Message::Interrupted => None,
    }
}

fn crash(vcpu: Option<usize>, cause: CrashCause) -> Stop {
    Stop::Crashed(Crash {
        cause,
        vcpu,
        snapshots: Vec::new(),
    })
}

/// Times consecutive steps.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}
