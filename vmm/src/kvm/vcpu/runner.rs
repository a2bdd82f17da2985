//! The vCPU thread's side: serve commands while parked, run the guest in between.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use abi::boot::InterruptMode;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MP_STATE_HALTED, kvm_guest_debug,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{
    Access, Command, Event, ExitReason, Fault, Notice, Platform, Reply, State, VcpuImage,
    VcpuSnapshot, VcpuSpec, Vitals,
};
use crate::kvm::{KvmError, failed, kick, sys};
use crate::memory::GuestRam;

/// First address of the canonical upper half.
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;
/// Most returns to the host while one instruction completes. An access to MMIO is split into pieces
/// of 8 bytes, so a well-meant instruction needs two; what needs more than this never ends.
const MAX_COMPLETIONS: usize = 64;

/// State of a vCPU thread.
pub(super) struct Runner {
    index: usize,
    fd: VcpuFd,
    interrupts: InterruptMode,
    platform: Arc<dyn Platform>,
    kick: kick::Receiver,
    commands: Receiver<Command>,
    replies: Sender<Reply>,
    vitals: Arc<Vitals>,
    halted: bool,
    last_exit: ExitReason,
    stepping: Option<Stepping>,
    /// KVM's memory slot refers to its mapping.
    _ram: GuestRam,
}

/// Single-stepping.
struct Stepping {
    /// Instructions to go.
    left: u64,
    done: u64,
    /// Address of the last one: `rep` makes one instruction several steps on some hosts.
    rip: u64,
}

/// How the guest's run ended.
enum Pause {
    Parked,
    Stop,
}

/// How one turn of the run loop ended.
enum Turn {
    /// Nothing to decide.
    Go,
    /// A kick came; every access is complete.
    Kicked,
    /// To be reported.
    Event(Event),
}

impl Runner {
    /// The thread's main function.
    pub(super) fn main(
        spec: VcpuSpec,
        vitals: Arc<Vitals>,
        commands: Receiver<Command>,
        replies: Sender<Reply>,
    ) {
        let _obituary = Obituary {
            index: spec.index,
            platform: Arc::clone(&spec.platform),
        };
        let pinned = spec.pin.filter(|cpu| sys::pin_to(*cpu).is_ok());
        let prepared = kick::Receiver::attach(spec.kick)
            .map_err(failed("pthread_sigmask"))
            .and_then(|kick| {
                sys::set_signal_mask(&spec.fd, kick::Receiver::mask_in_guest())
                    .map_err(failed("KVM_SET_SIGNAL_MASK"))?;
                Ok(kick)
            });
        let kick = match prepared {
            Ok(kick) => kick,
            Err(error) => {
                let _ = replies.send(Reply::Failed(error));
                return;
            }
        };
        let runner = Self {
            index: spec.index,
            fd: spec.fd,
            interrupts: spec.interrupts,
            platform: spec.platform,
            kick,
            commands,
            replies,
            vitals,
            halted: false,
            last_exit: ExitReason::None,
            stepping: None,
            _ram: spec.ram,
        };
        runner.reply(Reply::Started { pinned });
        runner.serve();
    }

    /// Parked: one command after the other.
    fn serve(mut self) {
        // A closed queue means that nobody holds the vCPU any more.
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Pause => self.reply(Reply::Paused),
                Command::Snapshot => {
                    let reply = self.snapshot();
                    self.reply(reply);
                }
                Command::Save { msrs } => {
                    let irqchip = self.interrupts == InterruptMode::Hardware;
                    let image = VcpuImage::take(&mut self.fd, &msrs, self.halted, irqchip);
                    self.reply(
                        image.map_or_else(Reply::Failed, |image| Reply::Saved(Box::new(image))),
                    );
                }
                Command::Restore(image) => {
                    self.halted = image.halted;
                    self.last_exit = ExitReason::None;
                    let stopped = match self.stepping {
                        Some(_) => self.single_step(None),
                        None => Ok(0),
                    };
                    let restored = stopped.and_then(|_| image.put(&mut self.fd));
                    self.reply(restored.map_or_else(Reply::Failed, |()| Reply::Restored));
                }
                Command::SingleStep(instructions) => {
                    let set = self.single_step(instructions);
                    self.reply(set.map_or_else(Reply::Failed, Reply::Stepping));
                }
                Command::Stop => break,
                Command::Resume => {
                    self.reply(Reply::Running);
                    match self.run_guest() {
                        Pause::Parked => {}
                        Pause::Stop => break,
                    }
                }
            }
        }
        self.reply(Reply::Stopped);
    }

    /// Running: until a command or an event.
    fn run_guest(&mut self) -> Pause {
        loop {
            match self.turn() {
                Turn::Go => {}
                Turn::Kicked => {
                    self.kick.drain();
                    match self.commands.try_recv() {
                        Ok(Command::Pause) => {
                            self.reply(Reply::Paused);
                            return Pause::Parked;
                        }
                        Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Pause::Stop,
                        // An interrupt arrived, or a kick that an earlier command left behind.
                        Err(TryRecvError::Empty) => {}
                        Ok(command) => self.reply(Reply::Failed(failed("a command")(
                            std::io::Error::other(format!("{command:?} to a running vCPU")),
                        ))),
                    }
                }
                Turn::Event(event) => {
                    let event = self
                        .complete_access()
                        .map_or_else(|fault| fault, |()| event);
                    self.notify(event);
                    return Pause::Parked;
                }
            }
        }
    }

    fn turn(&mut self) -> Turn {
        if let Some(left) = self.platform.held_back(self.index) {
            // Whoever pauses it meanwhile finds it between two instructions.
            return match self.complete_access() {
                Err(event) => Turn::Event(event),
                Ok(()) => {
                    self.kick.wait_for(left);
                    Turn::Kicked
                }
            };
        }
        if self.interrupts == InterruptMode::Controlled {
            let wakes =
                self.interrupts_enabled() && self.platform.pending_interrupt(self.index).is_some();
            if self.halted && !wakes {
                self.kick.wait();
                return Turn::Kicked;
            }
            self.halted = false;
            if let Err(error) = self.offer_interrupt() {
                return Turn::Event(unexpected(&error));
            }
        }
        let turn = self.enter();
        match turn {
            Turn::Go if self.stepping.is_some() => self
                .complete_access()
                .and_then(|()| self.stepped())
                .map_or_else(Turn::Event, |()| Turn::Go),
            turn => turn,
        }
    }

    /// Enters the guest once and handles the exit.
    fn enter(&mut self) -> Turn {
        let cpu = self.index;
        let result = match self.fd.run() {
            Ok(exit) => {
                // Relaxed: a counter that the watchdog compares with itself.
                self.vitals.exits.fetch_add(1, Ordering::Relaxed);
                match exit {
                    VcpuExit::MmioRead(gpa, data) => {
                        self.last_exit = ExitReason::Mmio { gpa, read: true };
                        self.platform.read(cpu, Access::Mmio(gpa), data)
                    }
                    VcpuExit::MmioWrite(gpa, data) => {
                        self.last_exit = ExitReason::Mmio { gpa, read: false };
                        self.platform.write(cpu, Access::Mmio(gpa), data)
                    }
                    VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => self.port_access(),
                    VcpuExit::Hlt => {
                        self.last_exit = ExitReason::Halt;
                        self.halted = true;
                        Ok(())
                    }
                    VcpuExit::IrqWindowOpen => {
                        self.last_exit = ExitReason::InterruptWindow;
                        Ok(())
                    }
                    // CR8 is kept in kvm_run; our local APIC's priority is its own TPR.
                    VcpuExit::SetTpr | VcpuExit::Intr => Ok(()),
                    VcpuExit::Shutdown => {
                        self.last_exit = ExitReason::Shutdown;
                        Err(Event::Fault(Fault::Shutdown))
                    }
                    VcpuExit::FailEntry(reason, _) => {
                        self.last_exit = ExitReason::FailEntry;
                        Err(Event::Fault(Fault::FailEntry { reason }))
                    }
                    VcpuExit::InternalError => {
                        self.last_exit = ExitReason::InternalError;
                        let (suberror, data) = sys::internal_error(&mut self.fd);
                        Err(Event::Fault(Fault::InternalError { suberror, data }))
                    }
                    VcpuExit::Debug(debug) if self.stepping.is_some() => {
                        self.last_exit = ExitReason::Other;
                        self.count_step(debug.pc);
                        self.stepped()
                    }
                    exit => {
                        let text = format!("{exit:?}");
                        self.last_exit = ExitReason::Other;
                        Err(Event::Fault(Fault::Unexpected(text)))
                    }
                }
            }
            Err(error) => match error.errno() {
                libc::EINTR => return Turn::Kicked,
                // A vCPU whose MP state was not runnable has become so.
                libc::EAGAIN => return Turn::Go,
                _ => Err(unexpected(&failed("KVM_RUN")(error))),
            },
        };
        result.map_or_else(Turn::Event, |()| Turn::Go)
    }

    /// Switches single-stepping on, for this many instructions, or off; gives back how many it took so far.
    fn single_step(&mut self, instructions: Option<u64>) -> Result<u64, KvmError> {
        let done = self.stepping.as_ref().map_or(0, |stepping| stepping.done);
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        self.stepping = instructions.map(|left| Stepping {
            left,
            done: 0,
            rip: regs.rip,
        });
        self.arm()?;
        Ok(done)
    }

    /// Tells KVM whether to stop after the next instruction.
    fn arm(&self) -> Result<(), KvmError> {
        let control = match self.stepping {
            Some(_) => KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            None => 0,
        };
        self.fd
            .set_guest_debug(&kvm_guest_debug {
                control,
                ..kvm_guest_debug::default()
            })
            .map_err(failed("KVM_SET_GUEST_DEBUG"))
    }

    /// The vCPU stands before the instruction at `rip` now.
    fn count_step(&mut self, rip: u64) {
        if let Some(stepping) = &mut self.stepping
            && rip != stepping.rip
        {
            stepping.rip = rip;
            stepping.done += 1;
            stepping.left = stepping.left.saturating_sub(1);
        }
    }

    /// An event where stepping is over. The kernel is in the upper half; programs are none of the window's.
    fn stepped(&self) -> Result<(), Event> {
        match &self.stepping {
            Some(Stepping { left, rip, .. }) if *left == 0 || *rip < UPPER_HALF => {
                Err(Event::Stepped { rip: *rip })
            }
            _ => Ok(()),
        }
    }

    fn port_access(&mut self) -> Result<(), Event> {
        let access = sys::port_access(&mut self.fd);
        self.last_exit = ExitReason::Port {
            port: access.port,
            read: access.is_read,
        };
        let port = Access::Port(access.port);
        access.data.chunks_mut(access.size).try_for_each(|element| {
            if access.is_read {
                self.platform.read(self.index, port, element)
            } else {
                self.platform.write(self.index, port, element)
            }
        })
    }

    /// Lets the instruction of the last exit complete, without executing another one.
    fn complete_access(&mut self) -> Result<(), Event> {
        if !matches!(
            self.last_exit,
            ExitReason::Port { .. } | ExitReason::Mmio { .. }
        ) {
            return Ok(());
        }
        self.fd.set_kvm_immediate_exit(1);
        let mut result = Err(Event::Fault(Fault::Unexpected(
            "an I/O instruction that does not complete".into(),
        )));
        for _ in 0..MAX_COMPLETIONS {
            match self.enter() {
                Turn::Kicked => {
                    result = Ok(());
                    break;
                }
                Turn::Go => {}
                // A second event of the same instruction: the first one is reported.
                Turn::Event(Event::Doorbell(_) | Event::Exit(_) | Event::Stepped { .. }) => {}
                Turn::Event(event) => {
                    result = Err(event);
                    break;
                }
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        if result.is_ok() && self.stepping.is_some() {
            // A step, of which KVM tells only where it does not emulate the access: to do so loses the trap flag,
            // that is kept for the RIP of KVM_SET_GUEST_DEBUG alone (__kvm_set_rflags in Linux's x86.c).
            let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"));
            result = regs
                .and_then(|regs| {
                    self.count_step(regs.rip);
                    self.arm()
                })
                .map_err(|error| unexpected(&error));
        }
        result
    }

    /// Injects a pending interrupt if the vCPU can take it now, else asks to be told when it can.
    fn offer_interrupt(&mut self) -> Result<(), KvmError> {
        let pending = self.platform.pending_interrupt(self.index).is_some();
        let ready =
            self.interrupts_enabled() && self.fd.get_kvm_run().ready_for_interrupt_injection != 0;
        if pending
            && ready
            && let Some(vector) = self.platform.accept_interrupt(self.index)
        {
            sys::interrupt(&self.fd, vector).map_err(failed("KVM_INTERRUPT"))?;
        }
        let waiting = pending && (!ready || self.platform.pending_interrupt(self.index).is_some());
        self.fd.get_kvm_run().request_interrupt_window = waiting.into();
        Ok(())
    }

    fn interrupts_enabled(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    fn snapshot(&self) -> Reply {
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"));
        let sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"));
        // A kick leaves a vCPU that KVM has halted in that state (vcpu_block in Linux's x86.c).
        let halted = self.halted
            || (self.interrupts == InterruptMode::Hardware
                && self
                    .fd
                    .get_mp_state()
                    .is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED));
        match (regs, sregs) {
            (Ok(regs), Ok(sregs)) => Reply::Snapshot(Box::new(VcpuSnapshot {
                index: self.index,
                state: State::Paused,
                halted,
                last_exit: self.last_exit,
                exits: self.vitals.exits(),
                pinned: None,
                regs: regs.into(),
                sregs: sregs.into(),
            })),
            (Err(error), _) | (_, Err(error)) => Reply::Failed(error),
        }
    }

    fn reply(&self, reply: Reply) {
        // A controller that is gone needs no reply; the queue's end is noticed at the next command.
        let _ = self.replies.send(reply);
    }

    fn notify(&self, event: Event) {
        self.platform.notify(Notice {
            vcpu: self.index,
            at: Instant::now(),
            event,
        });
    }
}

fn unexpected(error: &KvmError) -> Event {
    Event::Fault(Fault::Unexpected(format!("{error}: {}", error.source)))
}

/// Tells the controller of a thread that panics: nobody must wait for it.
struct Obituary {
    index: usize,
    platform: Arc<dyn Platform>,
}

impl Drop for Obituary {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.platform.notify(Notice {
                vcpu: self.index,
                at: Instant::now(),
                event: Event::ThreadPanic,
            });
        }
    }
}
