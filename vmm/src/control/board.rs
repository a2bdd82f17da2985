//! The board: devices on their buses, and the ways between the vCPUs.

use std::collections::BTreeSet;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use abi::boot::InterruptMode;
use abi::channel::Doorbell;
use abi::layout::{LAPIC_GPA, PAGE_SIZE};
use abi::port;
use devices::channel::DoorbellPort;
use devices::disk::{Disk, DiskPort, Dma};
use devices::exit::ExitPort;
use devices::lapic::{IpiKind, IpiRequest, LocalApic, LocalApics};
use devices::serial::{SerialPort, SerialRegisters};
use devices::{Bus, Effect};

use super::channel::Channel;
use super::console::Console;
use super::disturb::Disturber;
use crate::kvm::vcpu::{Access, Event, Fault, Kick, Notice, Platform};
use crate::kvm::vm::Wire;
use crate::memory::{GuestRam, PhysMem};
use crate::scenario::Disturb;

/// What the controller is told.
#[derive(Debug)]
pub(super) enum Message {
    /// By a vCPU thread.
    Vcpu(Notice),
    /// By the watchdog: no sign of life since this run began or a while after.
    Stalled {
        /// Number of the run.
        run: u64,
    },
    /// By an [`InterruptHandle`](super::InterruptHandle): its flag is set.
    Interrupted,
}

/// State of a [`Board`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct BoardImage {
    apics: Option<Vec<LocalApic>>,
    held: Vec<BTreeSet<u8>>,
    serial: SerialRegisters,
    disk: Disk,
    console: String,
}

/// Everything that the vCPU threads share.
pub(super) struct Board {
    ports: Bus,
    mmio: Bus,
    serial: Arc<SerialPort>,
    disk: Mutex<Disk>,
    /// To local APICs that are KVM's.
    wire: Option<Wire>,
    ram: GuestRam,
    console: Console,
    /// None with an in-kernel irqchip.
    apics: Option<Arc<LocalApics>>,
    kicks: Vec<Arc<Kick>>,
    /// In serialised runs: IPIs that were sent and not delivered, by target.
    held: Option<Mutex<Vec<BTreeSet<u8>>>>,
    /// In other runs: what disturbs them, and guest memory.
    disturber: Option<(Disturber, GuestRam)>,
    messages: Sender<Message>,
}

impl Board {
    /// A board for `vcpus` vCPUs.
    pub(super) fn new(
        vcpus: usize,
        interrupts: InterruptMode,
        console: &Console,
        disk: Disk,
        ram: &GuestRam,
        serialised: bool,
        messages: Sender<Message>,
    ) -> Self {
        let mut ports = Bus::default();
        let mut mmio = Bus::default();
        let fixed = "the addresses of abi are disjoint";
        let serial = Arc::new(SerialPort::new(Box::new(console.clone())));
        let word = |port: u16| u64::from(port)..u64::from(port) + 4;
        let registers = u64::from(port::SERIAL)..u64::from(port::SERIAL + port::SERIAL_LEN);
        ports.insert(registers, serial.clone()).expect(fixed);
        ports
            .insert(word(port::DOORBELL), Arc::new(DoorbellPort))
            .expect(fixed);
        ports
            .insert(word(port::EXIT), Arc::new(ExitPort))
            .expect(fixed);
        ports
            .insert(word(port::DISK), Arc::new(DiskPort))
            .expect(fixed);
        let apics = (interrupts == InterruptMode::Controlled).then(|| {
            let apics = Arc::new(LocalApics::new(vcpus));
            mmio.insert(LAPIC_GPA..LAPIC_GPA + PAGE_SIZE, apics.clone())
                .expect(fixed);
            apics
        });
        Self {
            ports,
            mmio,
            serial,
            console: console.clone(),
            apics,
            kicks: (0..vcpus).map(|_| Arc::default()).collect(),
            disk: Mutex::new(disk),
            wire: None,
            ram: ram.clone(),
            held: serialised.then(|| Mutex::new(vec![BTreeSet::new(); vcpus])),
            disturber: None,
            messages,
        }
    }

    /// The state of everything on the board. No vCPU runs.
    pub(super) fn image(&self) -> BoardImage {
        let held = self.held.as_ref();
        BoardImage {
            apics: self.apics.as_ref().map(|apics| apics.state()),
            held: held.map_or_else(Vec::new, |held| lock(held).clone()),
            serial: self.serial.registers(),
            disk: lock(&self.disk).clone(),
            console: self.console.text(),
        }
    }

    /// Puts it back. No vCPU runs.
    pub(super) fn restore(&self, image: &BoardImage) {
        if let (Some(apics), Some(state)) = (&self.apics, &image.apics) {
            apics.set_state(state);
        }
        lock(&self.disk).clone_from(&image.disk);
        if let Some(held) = &self.held {
            let mut held = lock(held);
            held.fill(BTreeSet::new());
            held.iter_mut()
                .zip(&image.held)
                .for_each(|(now, then)| now.clone_from(then));
        }
        let sink = Box::new(self.console.clone());
        self.serial.set_registers(image.serial, sink);
        self.console.set_text(&image.console);
    }

    /// The same board, whose devices interrupt by this wire where it has no local APICs.
    pub(super) fn wired(mut self, wire: Option<Wire>) -> Self {
        self.wire = wire;
        self
    }

    /// The same board, disturbed by these rules.
    pub(super) fn disturbed(mut self, rules: &Disturb, ram: &GuestRam) -> std::io::Result<Self> {
        let disturber = Disturber::new(rules, &self.kicks, self.apics.as_ref())?;
        self.disturber = disturber.map(|disturber| (disturber, ram.clone()));
        Ok(self)
    }

    /// What disturbs the run.
    pub(super) fn disturber(&self) -> Option<&Disturber> {
        self.disturber.as_ref().map(|(disturber, _)| disturber)
    }

    /// Where kicks for `vcpu` go.
    pub(super) fn kick(&self, vcpu: usize) -> Arc<Kick> {
        Arc::clone(&self.kicks[vcpu])
    }

    /// True where an IPI that was sent to `vcpu` is held.
    pub(super) fn in_flight(&self, vcpu: usize) -> bool {
        let held = self.held.as_ref();
        held.is_some_and(|held| {
            let held = lock(held);
            held.get(vcpu).is_some_and(|vectors| !vectors.is_empty())
        })
    }

    /// True where `vcpu` takes an interrupt as soon as it may.
    pub(super) fn pending(&self, vcpu: usize) -> bool {
        let apics = self.apics.as_ref();
        apics.is_some_and(|apics| apics.pending(vcpu).is_some())
    }

    /// Delivers what is held for `vcpu`.
    pub(super) fn deliver_held(&self, vcpu: usize) {
        if let (Some(held), Some(apics)) = (&self.held, &self.apics) {
            let mut held = lock(held);
            for vector in std::mem::take(&mut held[vcpu]) {
                apics.deliver(vcpu, vector);
            }
        }
    }

    /// True where a request of `vcpu` to the disk is under way.
    pub(super) fn disk_in_flight(&self, vcpu: usize) -> bool {
        lock(&self.disk).in_flight(vcpu)
    }

    /// Lets the disk do the oldest request of `vcpu`, and interrupts it where its local APIC is the board's.
    pub(super) fn disk_complete(&self, vcpu: usize) -> bool {
        // The disk's lock is released before the local APIC takes its own.
        let done = lock(&self.disk).complete(vcpu, &Ram(&self.ram));
        if done && let Some(apics) = &self.apics {
            apics.deliver(vcpu, abi::disk::VECTOR);
        }
        done
    }

    /// Takes a request. When it is done is a choice of the schedule; in runs without one it is done at once. The interrupt
    /// comes all the same: not who asks may need it, but others who wait for what is moved.
    fn disk_submit(&self, cpu: usize, request: u64) -> Result<(), Event> {
        let refused = lock(&self.disk).submit(cpu, request, &Ram(&self.ram));
        if self.held.is_some() {
            if !refused {
                Channel::new(&self.ram, cpu).set_budget(1);
            }
        } else if self.disk_complete(cpu)
            && let Some(wire) = &self.wire
        {
            let sent = wire.interrupt(cpu, abi::disk::VECTOR);
            sent.map_err(|error| unexpected(error.to_string()))?;
        }
        Ok(())
    }

    /// Delivers an IPI at once, or holds it.
    fn deliver(&self, request: IpiRequest) -> Result<(), Event> {
        let (IpiKind::Fixed(vector), Some(apics)) = (request.kind, &self.apics) else {
            return Err(unexpected(format!(
                "the guest sent an IPI that this machine does not deliver: {:?}",
                request.kind
            )));
        };
        if let Some(held) = &self.held {
            let mut held = lock(held);
            for (cpu, vectors) in held.iter_mut().enumerate() {
                if request.targets & 1 << cpu != 0 {
                    vectors.insert(vector);
                }
            }
            // Whoever chooses the schedule is asked at the next point: there is a new choice.
            Channel::new(&self.ram, request.from).set_budget(1);
            return Ok(());
        }
        for (cpu, kick) in self.kicks.iter().enumerate() {
            if request.targets & 1 << cpu != 0 {
                let arrives = match self.disturber() {
                    Some(disturber) => disturber.send(apics, request.from, cpu, vector),
                    None => {
                        apics.deliver(cpu, vector);
                        true
                    }
                };
                // The sender looks at its own local APIC before it enters the guest again.
                if arrives && cpu != request.from {
                    kick.kick();
                }
            }
        }
        Ok(())
    }
}

impl Platform for Board {
    fn read(&self, cpu: usize, access: Access, data: &mut [u8]) -> Result<(), Event> {
        let len = data.len();
        let (bus, address) = self.bus(access);
        bus.read(cpu, address, data)
            .map_err(|_| nothing_there("read", access, len))
    }

    fn write(&self, cpu: usize, access: Access, data: &[u8]) -> Result<(), Event> {
        let (bus, address) = self.bus(access);
        let effect = bus
            .write(cpu, address, data)
            .map_err(|_| nothing_there("write", access, data.len()))?;
        match effect {
            Effect::None => Ok(()),
            Effect::Doorbell(value) if self.is_disturbed(cpu, value) => Ok(()),
            Effect::Doorbell(value) => Err(Event::Doorbell(value)),
            Effect::Exit(status) => Err(Event::Exit(status)),
            Effect::Ipi(request) => self.deliver(request),
            Effect::Disk { cpu, request } => self.disk_submit(cpu, request),
        }
    }

    fn pending_interrupt(&self, cpu: usize) -> Option<u8> {
        self.apics.as_ref()?.pending(cpu)
    }

    fn accept_interrupt(&self, cpu: usize) -> Option<u8> {
        let apics = self.apics.as_ref()?;
        let vector = apics.accept(cpu)?;
        if let Some(disturber) = self.disturber() {
            disturber.accepted(apics, cpu);
        }
        Some(vector)
    }

    fn held_back(&self, cpu: usize) -> Option<Duration> {
        self.disturber()?.held_back(cpu)
    }

    fn notify(&self, notice: Notice) {
        // A controller that is gone needs no notice.
        let _ = self.messages.send(Message::Vcpu(notice));
    }
}

impl Board {
    /// Lets rules look at the point that the doorbell of `cpu` is about. True where nobody else need be told.
    fn is_disturbed(&self, cpu: usize, value: u32) -> bool {
        let Some((disturber, ram)) = &self.disturber else {
            return false;
        };
        let channel = Channel::new(ram, cpu);
        match channel.point() {
            Ok((point, _)) if value == Doorbell::Point as u32 => {
                disturber.passed(cpu, point);
                disturber.is_own(cpu, point) && channel.budget() != 0
            }
            _ => false,
        }
    }

    fn bus(&self, access: Access) -> (&Bus, u64) {
        match access {
            Access::Port(port) => (&self.ports, port.into()),
            Access::Mmio(gpa) => (&self.mmio, gpa),
        }
    }
}

/// Guest memory for the disk.
struct Ram<'m>(&'m GuestRam);

impl Dma for Ram<'_> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        self.0.read(gpa, bytes).is_ok()
    }
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        self.0.write(gpa, bytes).is_ok()
    }
}

/// A panic while one was locked leaves a valid set of IPIs, and a valid disk.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nothing_there(verb: &str, access: Access, len: usize) -> Event {
    let place = match access {
        Access::Port(port) => format!("port {port:#x}"),
        Access::Mmio(gpa) => format!("guest physical address {gpa:#x}"),
    };
    unexpected(format!(
        "{verb} of {len} bytes at {place}, where nothing is"
    ))
}

fn unexpected(text: String) -> Event {
    Event::Fault(Fault::Unexpected(text))
}
