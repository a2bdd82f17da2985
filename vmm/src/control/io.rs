//! The I/O thread: an event loop for the console and the watchdog. It never touches a vCPU.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::board::Message;
use super::channel::Channel;
use super::console::Console;
use crate::kvm::vcpu::Vitals;
use crate::memory::GuestRam;

/// Longest wait for the thread to end: its only long job is a sink that does not take text.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the watchdog looks within its time.
const LOOKS: u32 = 8;

/// Tells the watchdog when the machine runs: number of the run, 0 while it is paused.
#[derive(Clone, Debug, Default)]
pub(super) struct RunNumber(Arc<AtomicU64>);

impl RunNumber {
    /// Sets the number. Relaxed: a watchdog that sees it late looks again later.
    pub(super) fn set(&self, run: u64) {
        self.0.store(run, Ordering::Relaxed);
    }
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the watchdog watches.
pub(super) struct Watchdog {
    pub(super) ram: GuestRam,
    pub(super) vcpus: Vec<Arc<Vitals>>,
    pub(super) run: RunNumber,
    pub(super) patience: Duration,
    pub(super) messages: Sender<Message>,
}

impl Watchdog {
    fn signs_of_life(&self) -> Vec<[u64; 4]> {
        self.vcpus
            .iter()
            .enumerate()
            .map(|(vcpu, vitals)| {
                let [a, b, c] = Channel::new(&self.ram, vcpu).signs_of_life();
                [a, b, c, vitals.exits()]
            })
            .collect()
    }
}

/// The thread.
pub(super) struct IoThread {
    stop: EventFd,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts it.
    pub(super) fn start(console: Console, watchdog: Watchdog) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let interval = (watchdog.patience / LOOKS).max(Duration::from_millis(1));
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer
            .reset(interval, Some(interval))
            .map_err(io::Error::from)?;
        let subscriber = Subscriber {
            console,
            timer,
            stop: stop.try_clone()?,
            last: (0, Vec::new(), Instant::now()),
            told: 0,
            watchdog,
            stopped: false,
        };
        let (alive, ended) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("io".into())
            .spawn(move || {
                serve(subscriber);
                drop(alive);
            })?;
        Ok(Self {
            stop,
            ended,
            thread: Some(thread),
        })
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if self.ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Disconnected)
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn serve(subscriber: Subscriber) {
    let Ok(mut manager) = EventManager::new() else {
        return;
    };
    let id = manager.add_subscriber(subscriber);
    while manager
        .subscriber_mut(id)
        .is_ok_and(|subscriber| !subscriber.stopped)
        && manager.run().is_ok()
    {}
}

/// Sources of events, by their tag.
const CONSOLE: u32 = 0;
const TIMER: u32 = 1;
const STOP: u32 = 2;

struct Subscriber {
    console: Console,
    timer: TimerFd,
    stop: EventFd,
    watchdog: Watchdog,
    /// Run, signs of life, and since when they are the same.
    last: (u64, Vec<[u64; 4]>, Instant),
    /// Last run that was reported.
    told: u64,
    stopped: bool,
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        match events.data() {
            CONSOLE => self.console.stream(),
            TIMER => {
                let _ = self.timer.wait();
                self.look();
            }
            _ => {
                self.console.stream();
                self.stopped = true;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let sources = [
            (self.console.ready(), CONSOLE),
            (self.timer.as_raw_fd(), TIMER),
            (self.stop.as_raw_fd(), STOP),
        ];
        for (fd, tag) in sources {
            if ops
                .add(Events::with_data_raw(fd, tag, EventSet::IN))
                .is_err()
            {
                // Without its sources the loop could neither work nor end.
                self.stopped = true;
            }
        }
    }
}

impl Subscriber {
    fn look(&mut self) {
        let run = self.watchdog.run.get();
        if run == 0 {
            self.last.0 = 0;
            return;
        }
        let signs = self.watchdog.signs_of_life();
        if (run, &signs) != (self.last.0, &self.last.1) {
            self.last = (run, signs, Instant::now());
        } else if self.last.2.elapsed() >= self.watchdog.patience && self.told != run {
            self.told = run;
            let _ = self.watchdog.messages.send(Message::Stalled { run });
        }
    }
}
