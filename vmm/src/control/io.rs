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
            lookout: Lookout::new(watchdog.patience),
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
    lookout: Lookout,
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
        let signs = self.watchdog.signs_of_life();
        if self.lookout.is_stalled(run, signs, Instant::now()) {
            let _ = self.watchdog.messages.send(Message::Stalled { run });
        }
    }
}

/// Decides whether a machine shows signs of life.
struct Lookout {
    patience: Duration,
    run: u64,
    signs: Vec<[u64; 4]>,
    /// Since when `run` and `signs` are the same.
    since: Option<Instant>,
    /// Last run that was told to be stalled.
    told: u64,
}

impl Lookout {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            run: 0,
            signs: Vec::new(),
            since: None,
            told: 0,
        }
    }

    /// True once per run, where nothing has changed for as long as the patience lasts. `run` is 0
    /// while the machine is paused.
    fn is_stalled(&mut self, run: u64, signs: Vec<[u64; 4]>, now: Instant) -> bool {
        let since = match self.since {
            Some(since) if run != 0 && run == self.run && signs == self.signs => since,
            _ => {
                (self.run, self.signs, self.since) = (run, signs, Some(now));
                return false;
            }
        };
        let stalled = now.duration_since(since) >= self.patience && self.told != run;
        if stalled {
            self.told = run;
        }
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(4);

    /// Whether the lookout cries at each of these looks: second, run, sign.
    fn cries(looks: &[(u64, u64, u64)]) -> Vec<u64> {
        let start = Instant::now();
        let mut lookout = Lookout::new(PATIENCE);
        looks
            .iter()
            .filter(|(second, run, sign)| {
                let now = start + Duration::from_secs(*second);
                lookout.is_stalled(*run, vec![[0; 4], [0, 0, 0, *sign]], now)
            })
            .map(|(second, ..)| *second)
            .collect()
    }

    #[test]
    fn a_machine_without_a_sign_of_life_is_told_once_per_run() {
        let looks = [
            (0, 1, 5),
            (3, 1, 5),
            (4, 1, 5),
            (5, 1, 5),
            (9, 1, 5),
            (10, 2, 5),
            (14, 2, 5),
        ];
        assert_eq!(cries(&looks), [4, 14]);
    }

    #[test]
    fn any_change_is_a_sign_of_life() {
        assert_eq!(
            cries(&[(0, 1, 5), (3, 1, 6), (6, 1, 7), (9, 1, 8), (13, 1, 8)]),
            [13]
        );
    }

    #[test]
    fn paused_time_does_not_count() {
        assert!(cries(&[(0, 1, 5), (1, 0, 5), (9, 0, 5), (20, 2, 5), (23, 2, 5)]).is_empty());
        // Not even where the looks miss the pause: another run starts anew.
        assert!(cries(&[(0, 1, 5), (9, 2, 5), (12, 2, 5)]).is_empty());
    }
}
