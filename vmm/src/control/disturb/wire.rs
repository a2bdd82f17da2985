//! The wire between local APICs: IPIs that arrive late, twice, or after others.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::lapic::LocalApics;

use super::lock;
use crate::kvm::vcpu::Kick;

/// IPIs on their way, and the thread that lets them arrive.
pub(super) struct Wire {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<Flights>,
    changed: Condvar,
}

#[derive(Default)]
struct Flights {
    under_way: Vec<Flight>,
    /// By target: what arrives when it has taken another one.
    after_accept: Vec<Vec<u8>>,
    stop: bool,
}

struct Flight {
    to: usize,
    vector: u8,
    due: Instant,
    /// It waits for another one to come before it.
    overtaken: bool,
}

impl Wire {
    pub(super) fn start(apics: &Arc<LocalApics>, kicks: &[Arc<Kick>]) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(Flights {
                after_accept: vec![Vec::new(); kicks.len()],
                ..Flights::default()
            }),
            changed: Condvar::new(),
        });
        let thread = {
            let (shared, apics, kicks) = (Arc::clone(&shared), Arc::clone(apics), kicks.to_vec());
            std::thread::Builder::new()
                .name("wire".into())
                .spawn(move || shared.deliver(&apics, &kicks))?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn later(&self, to: usize, vector: u8, time: Duration, overtaken: bool) {
        let due = Instant::now() + time;
        lock(&self.shared.state).under_way.push(Flight {
            to,
            vector,
            due,
            overtaken,
        });
        self.shared.changed.notify_all();
    }

    /// Lets what waits to be overtaken on the way to `to` arrive after the next one. True where there was any.
    pub(super) fn overtake(&self, to: usize) -> bool {
        let mut state = lock(&self.shared.state);
        let Some(at) = (state.under_way.iter()).position(|it| it.overtaken && it.to == to) else {
            return false;
        };
        let vector = state.under_way.swap_remove(at).vector;
        state.after_accept[to].push(vector);
        true
    }

    pub(super) fn after_accept(&self, to: usize, vector: u8) {
        lock(&self.shared.state).after_accept[to].push(vector);
    }

    pub(super) fn take_after_accept(&self, to: usize) -> Vec<u8> {
        std::mem::take(&mut lock(&self.shared.state).after_accept[to])
    }
}

impl Shared {
    /// Until told to stop.
    fn deliver(&self, apics: &LocalApics, kicks: &[Arc<Kick>]) {
        let mut state = lock(&self.state);
        while !state.stop {
            let now = Instant::now();
            let (arrived, under_way) = std::mem::take(&mut state.under_way)
                .into_iter()
                .partition(|flight| flight.due <= now);
            state.under_way = under_way;
            let arrived: Vec<Flight> = arrived;
            for flight in arrived {
                apics.deliver(flight.to, flight.vector);
                kicks[flight.to].kick();
            }
            let next = state.under_way.iter().map(|flight| flight.due).min();
            state = match next {
                None => self.changed.wait(state),
                Some(due) => self
                    .changed
                    .wait_timeout(state, due.saturating_duration_since(now))
                    .map(|(state, _)| state)
                    .map_err(|error| PoisonError::new(error.into_inner().0)),
            }
            .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
