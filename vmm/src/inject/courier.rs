//! Brings IPIs that are late: a thread that sleeps until the next one is due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How late the second of two equal IPIs is, and most that an IPI waits for another one to come first.
const A_LITTLE: Duration = Duration::from_micros(200);
/// Longest sleep without anything that is due.
const IDLE: Duration = Duration::from_secs(1);

/// An IPI on its way.
type Ipi = (Instant, usize, u8);

/// The sending end. The thread ends with it.
#[derive(Debug)]
pub(crate) struct Courier {
    parcels: Sender<Parcel>,
}

#[derive(Debug)]
enum Parcel {
    At(Ipi),
    AfterTheNext(usize, u8),
    /// Somebody was sent one just now.
    Sent,
}

impl Courier {
    /// A courier that hands an IPI, when it is due, to `deliver` as a vCPU and a vector.
    pub(crate) fn start(deliver: impl Fn(usize, u8) + Send + 'static) -> io::Result<Self> {
        let (parcels, inbox) = mpsc::channel();
        std::thread::Builder::new()
            .name("courier".into())
            .spawn(move || {
                let mut due: BinaryHeap<Reverse<Ipi>> = BinaryHeap::new();
                let mut held: Vec<Ipi> = Vec::new();
                loop {
                    let next = due.peek().map(|Reverse((at, ..))| *at);
                    let next = held.iter().map(|(at, ..)| *at).chain(next).min();
                    let now = Instant::now();
                    let sleep = next.map_or(IDLE, |next| next.saturating_duration_since(now));
                    match inbox.recv_timeout(sleep) {
                        Ok(Parcel::At(ipi)) => due.push(Reverse(ipi)),
                        Ok(Parcel::AfterTheNext(cpu, vector)) => {
                            held.push((Instant::now() + A_LITTLE, cpu, vector));
                        }
                        Ok(Parcel::Sent) => held.iter_mut().for_each(|ipi| ipi.0 = Instant::now()),
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                    let now = Instant::now();
                    while due.peek().is_some_and(|Reverse((at, ..))| *at <= now) {
                        if let Some(Reverse((_, cpu, vector))) = due.pop() {
                            deliver(cpu, vector);
                        }
                    }
                    held.retain(|(at, cpu, vector)| {
                        if *at <= now {
                            deliver(*cpu, *vector);
                        }
                        *at > now
                    });
                }
            })?;
        Ok(Self { parcels })
    }

    /// Brings it after `time`.
    pub(crate) fn later(&self, time: Duration, cpu: usize, vector: u8) {
        self.send(Parcel::At((Instant::now() + time, cpu, vector)));
    }

    /// Brings it once more, a little later.
    pub(crate) fn again(&self, cpu: usize, vector: u8) {
        self.later(A_LITTLE, cpu, vector);
    }

    /// Brings it after the next IPI that is [sent](Self::sent), or a little later.
    pub(crate) fn after_the_next(&self, cpu: usize, vector: u8) {
        self.send(Parcel::AfterTheNext(cpu, vector));
    }

    /// An IPI was delivered.
    pub(crate) fn sent(&self) {
        self.send(Parcel::Sent);
    }

    fn send(&self, parcel: Parcel) {
        // The thread ends only when this sender is gone.
        let _ = self.parcels.send(parcel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_and_what_waits_for_another_comes_after_it() {
        let (sender, arrived) = mpsc::channel();
        let courier =
            Courier::start(move |cpu, vector| sender.send((cpu, vector)).unwrap()).unwrap();
        courier.after_the_next(0, 0xf0);
        courier.later(Duration::ZERO, 1, 0xf1);
        courier.again(2, 0xf2);
        courier.sent();
        let mut all: Vec<_> = (0..3)
            .map(|_| arrived.recv_timeout(Duration::from_secs(10)).unwrap())
            .collect();
        all.sort_unstable();
        assert_eq!(all, [(0, 0xf0), (1, 0xf1), (2, 0xf2)]);
        drop(courier);
        assert!(
            arrived.recv_timeout(Duration::from_secs(10)).is_err(),
            "the thread ends"
        );
    }
}
