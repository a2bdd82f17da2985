//! The board: devices on their buses, and the ways between the vCPUs.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::boot::InterruptMode;
use abi::channel::Doorbell;
use abi::layout::{LAPIC_GPA, PAGE_SIZE};
use abi::port;
use devices::channel::DoorbellPort;
use devices::exit::ExitPort;
use devices::lapic::{IpiKind, IpiRequest, LocalApic, LocalApics};
use devices::serial::{SerialPort, SerialRegisters};
use devices::{Bus, Effect};

use super::channel::Channel;
use super::console::Console;
use crate::inject::{Courier, Injector, IpiFaultKind};
use crate::kvm::vcpu::{Access, Event, Fault, Kick, Notice, Platform};
use crate::memory::GuestRam;

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
    console: String,
}

/// Everything that the vCPU threads share.
pub(super) struct Board {
    ports: Bus,
    mmio: Bus,
    serial: Arc<SerialPort>,
    console: Console,
    /// None with an in-kernel irqchip.
    apics: Option<Arc<LocalApics>>,
    kicks: Vec<Arc<Kick>>,
    /// In serialised runs: IPIs that were sent and not delivered, by target, and guest memory.
    held: Option<(Mutex<Vec<BTreeSet<u8>>>, GuestRam)>,
    injection: Option<Injection>,
    messages: Sender<Message>,
}

/// What is done to a parallel run.
struct Injection {
    injector: Arc<Injector>,
    courier: Option<Courier>,
    ram: GuestRam,
    /// Points that are stops for the controller too.
    stops: AtomicU64,
}

impl Board {
    /// A board for `vcpus` vCPUs.
    pub(super) fn new(
        vcpus: usize,
        interrupts: InterruptMode,
        console: &Console,
        hold: Option<GuestRam>,
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
            held: hold.map(|ram| (Mutex::new(vec![BTreeSet::new(); vcpus]), ram)),
            injection: None,
            messages,
        }
    }

    /// From now on `injector` has its say.
    pub(super) fn inject(
        &mut self,
        injector: Arc<Injector>,
        ram: &GuestRam,
    ) -> std::io::Result<()> {
        let courier = self.apics.clone().map(|apics| {
            let kicks = self.kicks.clone();
            Courier::start(move |cpu, vector| {
                apics.deliver(cpu, vector);
                kicks[cpu].kick();
            })
        });
        self.injection = Some(Injection {
            injector,
            courier: courier.transpose()?,
            ram: ram.clone(),
            stops: AtomicU64::new(0),
        });
        Ok(())
    }

    /// Which points stop the machine; the others that are trapped are the injector's.
    pub(super) fn set_stops(&self, points: u64) {
        if let Some(injection) = &self.injection {
            injection.stops.store(points, Relaxed);
        }
    }

    /// A vCPU rang at a point. False: that was for the injector alone.
    fn at_point(&self, cpu: usize) -> bool {
        let Some(injection) = &self.injection else {
            return true;
        };
        let channel = Channel::new(&injection.ram, cpu);
        let Ok((point, _)) = channel.point() else {
            return true;
        };
        injection.injector.at(cpu, point);
        injection.stops.load(Relaxed) & 1 << point as u64 != 0 || channel.budget() == 0
    }

    /// Delivers an IPI to `cpu` as the rules say.
    fn deliver_one(&self, from: usize, cpu: usize, vector: u8, apics: &LocalApics) {
        let injection = self.injection.as_ref();
        let fate = injection.and_then(|it| Some((it.injector.ipi(cpu)?, it.courier.as_ref()?)));
        match fate {
            Some((IpiFaultKind::Drop, _)) => return,
            Some((IpiFaultKind::Delay(time), courier)) => {
                return courier.later(time, cpu, vector);
            }
            Some((IpiFaultKind::Reorder, courier)) => {
                return courier.after_the_next(cpu, vector);
            }
            Some((IpiFaultKind::Duplicate, courier)) => courier.again(cpu, vector),
            None => {}
        }
        apics.deliver(cpu, vector);
        // The sender looks at its own local APIC before it enters the guest again.
        if cpu != from {
            self.kicks[cpu].kick();
        }
        if let Some(courier) = injection.and_then(|injection| injection.courier.as_ref()) {
            courier.sent();
        }
    }

    /// The state of everything on the board. No vCPU runs.
    pub(super) fn image(&self) -> BoardImage {
        let held = self.held.as_ref();
        BoardImage {
            apics: self.apics.as_ref().map(|apics| apics.state()),
            held: held.map_or_else(Vec::new, |(held, _)| lock(held).clone()),
            serial: self.serial.registers(),
            console: self.console.text(),
        }
    }

    /// Puts it back. No vCPU runs.
    pub(super) fn restore(&self, image: &BoardImage) {
        if let (Some(apics), Some(state)) = (&self.apics, &image.apics) {
            apics.set_state(state);
        }
        if let Some((held, _)) = &self.held {
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

    /// Where kicks for `vcpu` go.
    pub(super) fn kick(&self, vcpu: usize) -> Arc<Kick> {
        Arc::clone(&self.kicks[vcpu])
    }

    /// True where an IPI that was sent to `vcpu` is held.
    pub(super) fn in_flight(&self, vcpu: usize) -> bool {
        let held = self.held.as_ref();
        held.is_some_and(|(held, _)| {
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
        if let (Some((held, _)), Some(apics)) = (&self.held, &self.apics) {
            let mut held = lock(held);
            for vector in std::mem::take(&mut held[vcpu]) {
                apics.deliver(vcpu, vector);
            }
        }
    }

    /// Delivers an IPI at once, or holds it.
    fn deliver(&self, request: IpiRequest) -> Result<(), Event> {
        let (IpiKind::Fixed(vector), Some(apics)) = (request.kind, &self.apics) else {
            return Err(unexpected(format!(
                "the guest sent an IPI that this machine does not deliver: {:?}",
                request.kind
            )));
        };
        if let Some((held, ram)) = &self.held {
            let mut held = lock(held);
            for (cpu, vectors) in held.iter_mut().enumerate() {
                if request.targets & 1 << cpu != 0 {
                    vectors.insert(vector);
                }
            }
            // Whoever chooses the schedule is asked at the next point: there is a new choice.
            Channel::new(ram, request.from).set_budget(1);
            return Ok(());
        }
        for cpu in 0..self.kicks.len() {
            if request.targets & 1 << cpu != 0 {
                self.deliver_one(request.from, cpu, vector, apics);
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
            Effect::Doorbell(value) if value == Doorbell::Point as u32 && !self.at_point(cpu) => {
                Ok(())
            }
            Effect::Doorbell(value) => Err(Event::Doorbell(value)),
            Effect::Exit(status) => Err(Event::Exit(status)),
            Effect::Ipi(request) => self.deliver(request),
        }
    }

    fn pending_interrupt(&self, cpu: usize) -> Option<u8> {
        self.apics.as_ref()?.pending(cpu)
    }

    fn accept_interrupt(&self, cpu: usize) -> Option<u8> {
        self.apics.as_ref()?.accept(cpu)
    }

    fn notify(&self, notice: Notice) {
        // A controller that is gone needs no notice.
        let _ = self.messages.send(Message::Vcpu(notice));
    }
}

impl Board {
    fn bus(&self, access: Access) -> (&Bus, u64) {
        match access {
            Access::Port(port) => (&self.ports, port.into()),
            Access::Mmio(gpa) => (&self.mmio, gpa),
        }
    }
}

/// A panic while the held IPIs were locked leaves a valid set.
fn lock<T>(held: &Mutex<T>) -> MutexGuard<'_, T> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
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
