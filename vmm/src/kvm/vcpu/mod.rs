//! vCPU threads.
//!
//! One thread per vCPU owns its KVM descriptor and everything that belongs to it. Others speak to it
//! through [`Vcpu`]: a command goes into a queue and the thread is kicked; one reply comes back, and
//! nobody waits for it without a bound. What the guest does that needs a decision goes the other way,
//! as a [`Notice`], after which the thread has parked itself.
//!
//! A vCPU is parked only after KVM_RUN has returned EINTR, which it does only once the access of the
//! last exit is complete: a paused vCPU never stands in the middle of an instruction. No lock is held
//! while in KVM_RUN or while waiting.

mod image;
mod runner;
mod snapshot;
mod state;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::boot::InterruptMode;
use kvm_ioctls::VcpuFd;

pub(crate) use super::kick::Kick;
use super::stats::Counters;
use super::{KvmError, vm};
use crate::memory::GuestRam;
use runner::Runner;

pub(crate) use image::VcpuImage;
pub use snapshot::{ExitReason, Registers, SystemRegisters, VcpuSnapshot};
pub use state::{IllegalStep, State, Step};

/// Longest wait for a reply. A reply takes microseconds; a thread that is this late is stuck in the
/// host's kernel.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers what a vCPU asks of the machine. Called from the vCPU threads, several at once.
pub(crate) trait Platform: Send + Sync {
    /// Port I/O by one element of 1, 2 or 4 bytes, or an MMIO access.
    fn read(&self, cpu: usize, access: Access, data: &mut [u8]) -> Result<(), Event>;
    /// Likewise; an event parks the vCPU.
    fn write(&self, cpu: usize, access: Access, data: &[u8]) -> Result<(), Event>;
    /// The vector that the local APIC of `cpu` would deliver now (controlled interrupts only).
    fn pending_interrupt(&self, cpu: usize) -> Option<u8>;
    /// Moves that vector into service.
    fn accept_interrupt(&self, cpu: usize) -> Option<u8>;
    /// How much longer `cpu` must not enter the guest, none where it may.
    fn held_back(&self, _cpu: usize) -> Option<Duration> {
        None
    }
    /// Takes what a vCPU has to say.
    fn notify(&self, notice: Notice);
}

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Port I/O.
    Port(u16),
    /// A guest physical address that is not memory.
    Mmio(u64),
}

/// What a vCPU thread tells the controller.
#[derive(Debug)]
pub(crate) struct Notice {
    /// Which vCPU.
    pub(crate) vcpu: usize,
    /// When.
    pub(crate) at: Instant,
    /// What.
    pub(crate) event: Event,
}

/// Why a vCPU has parked itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The doorbell rang, with this value.
    Doorbell(u32),
    /// The guest ends the run with this status.
    Exit(u32),
    /// It was single-stepped for as long as it was to be.
    Stepped {
        /// Address of the next instruction.
        rip: u64,
    },
    /// It cannot go on.
    Fault(Fault),
    /// The thread itself panicked: a bug of the host side.
    ThreadPanic,
}

/// Why a vCPU cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// KVM_EXIT_SHUTDOWN.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// By suberror.
        data: Vec<u64>,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry {
        /// The CPU's reason.
        reason: u64,
    },
    /// Anything else that this machine does not do.
    Unexpected(String),
}

/// Orders to a vCPU thread.
#[derive(Clone, Debug)]
enum Command {
    Resume,
    Pause,
    Snapshot,
    Save {
        msrs: Arc<[u32]>,
    },
    Restore(Arc<VcpuImage>),
    /// Stop after this many instructions at CPL 0, or at the first that is not; none: no longer.
    SingleStep(Option<u64>),
    Stop,
}

/// Its replies, one per command and one to start with.
#[derive(Debug)]
enum Reply {
    Started {
        pinned: Option<usize>,
    },
    Running,
    Paused,
    Snapshot(Box<VcpuSnapshot>),
    Saved(Box<VcpuImage>),
    Restored,
    /// Single-stepping is set; so many instructions it took since it was set last.
    Stepping(u64),
    Stopped,
    Failed(KvmError),
}

/// What a vCPU did wrong, or had done to it.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An order that its state does not allow: a bug of the caller.
    #[error("vCPU {vcpu}")]
    Illegal {
        /// Which vCPU.
        vcpu: usize,
        /// What was wrong.
        source: IllegalStep,
    },
    /// No reply in time.
    #[error("vCPU {vcpu}, {state}, has not answered \"{step}\" within {} s", PATIENCE.as_secs())]
    Timeout {
        /// Which vCPU.
        vcpu: usize,
        /// Its last known state.
        state: State,
        /// What it was asked.
        step: Step,
    },
    /// Its thread is gone.
    #[error("the thread of vCPU {vcpu}, {state}, has died")]
    Died {
        /// Which vCPU.
        vcpu: usize,
        /// Its last known state.
        state: State,
    },
    /// KVM refused something.
    #[error("vCPU {vcpu}")]
    Kvm {
        /// Which vCPU.
        vcpu: usize,
        /// What.
        source: KvmError,
    },
    /// No thread.
    #[error("no thread for vCPU {vcpu}")]
    Spawn {
        /// Which vCPU.
        vcpu: usize,
        /// Why.
        source: std::io::Error,
    },
}

/// What both sides of a vCPU see without asking.
#[derive(Debug, Default)]
pub(crate) struct Vitals {
    exits: AtomicU64,
}

impl Vitals {
    /// Exits that the guest caused.
    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

/// What a vCPU thread is made of.
pub(crate) struct VcpuSpec {
    pub(crate) index: usize,
    pub(crate) fd: VcpuFd,
    pub(crate) ram: GuestRam,
    pub(crate) interrupts: InterruptMode,
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) kick: Arc<Kick>,
    /// Host CPU to pin the thread to, best effort.
    pub(crate) pin: Option<usize>,
}

/// Handle of one vCPU.
pub(crate) struct Vcpu {
    index: usize,
    state: State,
    commands: Sender<Command>,
    replies: Receiver<Reply>,
    kick: Arc<Kick>,
    vitals: Arc<Vitals>,
    stats: Option<File>,
    pinned: Option<usize>,
    thread: Option<JoinHandle<()>>,
    /// What the thread will be, until it is started.
    runner: Option<Box<dyn FnOnce() + Send>>,
}

impl Vcpu {
    /// A vCPU in [`State::Created`]: no thread yet.
    pub(crate) fn new(spec: VcpuSpec) -> Self {
        let (commands, receiver) = mpsc::channel();
        let (sender, replies) = mpsc::channel();
        let vitals = Arc::new(Vitals::default());
        let (index, kick) = (spec.index, Arc::clone(&spec.kick));
        let stats = vm::vcpu_stats_file(&spec.fd);
        let runner = {
            let vitals = Arc::clone(&vitals);
            Box::new(move || Runner::main(spec, vitals, receiver, sender))
        };
        Self {
            index,
            state: State::Created,
            commands,
            replies,
            kick,
            vitals,
            stats,
            pinned: None,
            thread: None,
            runner: Some(runner),
        }
    }

    /// Starts the thread; the vCPU is then paused.
    pub(crate) fn start(&mut self) -> Result<(), VcpuError> {
        let next = self.check(Step::Start)?;
        let runner = self.runner.take().expect("a created vCPU has its runner");
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(runner)
            .map_err(|source| VcpuError::Spawn {
                vcpu: self.index,
                source,
            })?;
        self.thread = Some(thread);
        match self.reply(Step::Start)? {
            Reply::Started { pinned } => self.pinned = pinned,
            reply => return Err(self.unexpected(Step::Start, reply)),
        }
        self.state = next;
        Ok(())
    }

    /// Asks for `step`. The request and the wait for its reply are separate so that all vCPUs can be
    /// asked before any is waited for.
    pub(crate) fn request(&mut self, step: Step) -> Result<(), VcpuError> {
        self.check(step)?;
        let command = match step {
            Step::Resume => Command::Resume,
            Step::Pause => Command::Pause,
            Step::Stop => Command::Stop,
            Step::Inspect => Command::Snapshot,
            Step::Start | Step::Park | Step::Save | Step::Restore | Step::Debug => {
                unreachable!("{step} is no request")
            }
        };
        // The command first, then the kick: a thread that takes the kick finds the command.
        self.commands.send(command).map_err(|_| self.died())?;
        // Only a paused vCPU is resumed, and that one waits for commands: a kick would make it leave
        // the guest at once.
        if step != Step::Resume {
            self.kick.kick();
        }
        Ok(())
    }

    /// Waits for the reply to `step`.
    pub(crate) fn wait(&mut self, step: Step) -> Result<(), VcpuError> {
        let next = self.check(step)?;
        match (step, self.reply(step)?) {
            (Step::Resume, Reply::Running)
            | (Step::Pause, Reply::Paused)
            | (Step::Restore, Reply::Restored)
            | (Step::Stop, Reply::Stopped) => {
                self.state = next;
                Ok(())
            }
            (step, reply) => Err(self.unexpected(step, reply)),
        }
    }

    /// Notes that the thread has parked itself, as its [`Notice`] says.
    pub(crate) fn parked(&mut self) -> Result<(), VcpuError> {
        self.state = self.check(Step::Park)?;
        Ok(())
    }

    /// Registers and state of a paused vCPU.
    pub(crate) fn snapshot(&self) -> Result<VcpuSnapshot, VcpuError> {
        self.check(Step::Inspect)?;
        self.commands
            .send(Command::Snapshot)
            .map_err(|_| self.died())?;
        match self.reply(Step::Inspect)? {
            Reply::Snapshot(snapshot) => Ok(VcpuSnapshot {
                state: self.state,
                pinned: self.pinned,
                ..*snapshot
            }),
            reply => Err(self.unexpected(Step::Inspect, reply)),
        }
    }

    /// Everything that a paused vCPU is, with those of `msrs` that it has.
    pub(crate) fn save(&self, msrs: &Arc<[u32]>) -> Result<VcpuImage, VcpuError> {
        self.check(Step::Save)?;
        let msrs = Arc::clone(msrs);
        self.commands
            .send(Command::Save { msrs })
            .map_err(|_| self.died())?;
        match self.reply(Step::Save)? {
            Reply::Saved(image) => Ok(*image),
            reply => Err(self.unexpected(Step::Save, reply)),
        }
    }

    /// Asks a paused vCPU to become `image`, its translations flushed.
    pub(crate) fn request_restore(&mut self, image: Arc<VcpuImage>) -> Result<(), VcpuError> {
        self.check(Step::Restore)?;
        self.commands
            .send(Command::Restore(image))
            .map_err(|_| self.died())
    }

    /// Makes a paused vCPU stop ([`Event::Stepped`]) after `instructions` at CPL 0, or no longer; says how
    /// many it has executed since it was told so last.
    pub(crate) fn single_step(&mut self, instructions: Option<u64>) -> Result<u64, VcpuError> {
        self.check(Step::Debug)?;
        self.commands
            .send(Command::SingleStep(instructions))
            .map_err(|_| self.died())?;
        match self.reply(Step::Debug)? {
            Reply::Stepping(instructions) => Ok(instructions),
            reply => Err(self.unexpected(Step::Debug, reply)),
        }
    }

    /// Its state, as far as its replies and notices tell.
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// Which vCPU it is.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Counters that can be read at any time.
    pub(crate) fn vitals(&self) -> &Arc<Vitals> {
        &self.vitals
    }

    /// Host CPU that its thread is pinned to.
    pub(crate) fn pinned(&self) -> Option<usize> {
        self.pinned
    }

    /// KVM's counters, none where the host has none.
    pub(crate) fn counters(&self) -> Option<Result<Counters, KvmError>> {
        self.stats.as_ref().map(vm::read_counters)
    }

    fn check(&self, step: Step) -> Result<State, VcpuError> {
        self.state.after(step).map_err(|source| VcpuError::Illegal {
            vcpu: self.index,
            source,
        })
    }

    fn reply(&self, step: Step) -> Result<Reply, VcpuError> {
        match self.replies.recv_timeout(PATIENCE) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Disconnected) => Err(self.died()),
            Err(RecvTimeoutError::Timeout) => Err(VcpuError::Timeout {
                vcpu: self.index,
                state: self.state,
                step,
            }),
        }
    }

    fn unexpected(&self, step: Step, reply: Reply) -> VcpuError {
        let source = match reply {
            Reply::Failed(source) => source,
            reply => super::failed("answering a command")(std::io::Error::other(format!(
                "{reply:?} is no answer to \"{step}\""
            ))),
        };
        VcpuError::Kvm {
            vcpu: self.index,
            source,
        }
    }

    fn died(&self) -> VcpuError {
        VcpuError::Died {
            vcpu: self.index,
            state: self.state,
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let stopped = self.state == State::Stopped
            || thread.is_finished()
            || (self.request(Step::Stop).is_ok() && self.wait(Step::Stop).is_ok());
        // A thread that does not answer is stuck in the host's kernel: waiting for it would hang.
        if stopped {
            let _ = thread.join();
        }
    }
}
