//! The testbed channel, kernel side: events, scheduling points, failpoints.
//!
//! Built without the feature `testbed` all of it vanishes from the code: the kernel calls it through the macros
//! here, which then do not even compute the arguments. Most of those are loads of atomics, and a
//! compiler keeps a load of an atomic whose value nobody uses. `benches/tests/fault_path.rs` compares the
//! result with a kernel whose macros expand to nothing (`--cfg testbed_absent`).

use abi::channel::EventKind;
use abi::failpoint::Failpoint;
use abi::point::Point;

use crate::Kernel;
use crate::arch::Arch;

/// True where the channel is built in.
pub(crate) const BUILT_IN: bool = cfg!(feature = "testbed");

/// A value that is read only to be told in an event, and before that: not read at all without events.
#[inline]
pub(crate) fn told<T: Default>(read: impl FnOnce() -> T) -> T {
    if BUILT_IN { read() } else { T::default() }
}

/// `event!(kernel, kind, args)`: [`Kernel::event`].
#[cfg(not(testbed_absent))]
macro_rules! event {
    ($kernel:expr, $kind:expr, $args:expr $(,)?) => {
        if $crate::testbed::BUILT_IN {
            $kernel.event($kind, $args)
        }
    };
}

/// `point!(kernel, point, args)`: [`Kernel::point`].
#[cfg(not(testbed_absent))]
macro_rules! point {
    ($kernel:expr, $point:expr, $args:expr $(,)?) => {
        if $crate::testbed::BUILT_IN {
            $kernel.point($point, $args)
        }
    };
}

/// `fail!(kernel, failpoint)`: [`Kernel::fail`].
#[cfg(not(testbed_absent))]
macro_rules! fail {
    ($kernel:expr, $failpoint:expr) => {
        ($crate::testbed::BUILT_IN && $kernel.fail($failpoint))
    };
}

/// `progress!(kernel)`: [`Kernel::progress`].
#[cfg(not(testbed_absent))]
macro_rules! progress {
    ($kernel:expr) => {
        if $crate::testbed::BUILT_IN {
            $kernel.progress()
        }
    };
}

#[cfg(testbed_absent)]
macro_rules! event {
    ($($any:tt)*) => {{}};
}
#[cfg(testbed_absent)]
macro_rules! point {
    ($($any:tt)*) => {{}};
}
#[cfg(testbed_absent)]
macro_rules! fail {
    ($($any:tt)*) => {
        false
    };
}
#[cfg(testbed_absent)]
macro_rules! progress {
    ($($any:tt)*) => {{}};
}

impl<A: Arch> Kernel<A> {
    /// Records what happened, if the host asked for events of this kind.
    #[inline]
    pub fn event(&self, kind: EventKind, args: [u64; 5]) {
        #[cfg(feature = "testbed")]
        imp::event(self, kind, args);
        #[cfg(not(feature = "testbed"))]
        let _ = (kind, args);
    }

    /// A place where the host may stop this vCPU.
    #[inline]
    pub fn point(&self, point: Point, args: [u64; 2]) {
        #[cfg(feature = "testbed")]
        imp::point(self, point, args);
        #[cfg(not(feature = "testbed"))]
        let _ = (point, args);
    }

    /// True where the host wants this passage of the failpoint to fail.
    #[inline]
    pub fn fail(&self, failpoint: Failpoint) -> bool {
        #[cfg(feature = "testbed")]
        return imp::fail(self, failpoint);
        #[cfg(not(feature = "testbed"))]
        {
            let _ = failpoint;
            false
        }
    }

    /// A sign of life for the host's watchdog: a system call, a fault, an interrupt, a switch.
    #[inline]
    pub fn progress(&self) {
        #[cfg(feature = "testbed")]
        imp::progress(self);
    }
}

#[cfg(feature = "testbed")]
mod imp {
    use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

    use abi::channel::{Doorbell, Event, EventKind, RING_RECORDS};
    use abi::failpoint::Failpoint;
    use abi::param::Stamp;
    use abi::point::Point;

    use crate::Kernel;
    use crate::arch::Arch;

    #[inline]
    pub(super) fn event<A: Arch>(kernel: &Kernel<A>, kind: EventKind, args: [u64; 5]) {
        let channel = kernel.arch.channel();
        if channel.event_mask.load(Relaxed) & (1 << kind as u32) != 0 {
            // One by one: an array would be put into memory before the mask is looked at.
            let [a, b, c, d, e] = args;
            record(kernel, kind, a, b, c, d, e);
        }
    }

    #[cold]
    fn record<A: Arch>(
        kernel: &Kernel<A>,
        kind: EventKind,
        a: u64,
        b: u64,
        c: u64,
        d: u64,
        e: u64,
    ) {
        let channel = kernel.arch.channel();
        let head = channel.ring_head.load(Relaxed);
        if channel.ring_exits.load(Relaxed) != 0
            && head.saturating_sub(channel.ring_tail.load(Relaxed)) >= RING_RECORDS as u64
        {
            kernel.arch.doorbell(Doorbell::RingFull);
        }
        let task = kernel.this_cpu().current.get();
        let task = if task.is_null() {
            0
        } else {
            kernel.obj(task).id.load(Relaxed)
        };
        let event = Event {
            stamp: stamp(kernel),
            kind: kind as u32,
            task,
            args: [a, b, c, d, e],
            sequence: head,
        };
        kernel
            .arch
            .write_event(head as usize % RING_RECORDS, &event);
        // Release: a host that sees the new head sees the record.
        channel.ring_head.store(head.wrapping_add(1), Release);
    }

    fn stamp<A: Arch>(kernel: &Kernel<A>) -> u64 {
        match kernel.config.stamp {
            Stamp::Tsc => kernel.arch.tsc(),
            // AcqRel: an event that was made after this CPU saw what led to another one has the later
            // number.
            Stamp::Ticket => kernel.root().ticket.fetch_add(1, AcqRel),
        }
    }

    #[inline]
    pub(super) fn fail<A: Arch>(kernel: &Kernel<A>, failpoint: Failpoint) -> bool {
        let left = &kernel.arch.channel().fail[failpoint as usize];
        match left.load(Relaxed) {
            0 => false,
            passages => {
                left.store(passages - 1, Relaxed);
                if passages == 1 {
                    kernel.event(EventKind::FailpointHit, [failpoint as u64, 0, 0, 0, 0]);
                }
                passages == 1
            }
        }
    }

    #[inline]
    pub(super) fn point<A: Arch>(kernel: &Kernel<A>, point: Point, args: [u64; 2]) {
        let channel = kernel.arch.channel();
        let id = point as usize;
        let passed = channel.points_passed.load(Relaxed);
        channel.points_passed.store(passed.wrapping_add(1), Relaxed);
        let budget = channel.budget.load(Relaxed).wrapping_sub(1);
        channel.budget.store(budget, Relaxed);
        if budget == 0 || channel.trap[id / 64].load(Relaxed) & (1 << (id % 64)) != 0 {
            stop(kernel, point, args);
        }
    }

    #[cold]
    fn stop<A: Arch>(kernel: &Kernel<A>, point: Point, args: [u64; 2]) {
        let channel = kernel.arch.channel();
        channel.point.store(point as u64, Relaxed);
        channel.point_args[0].store(args[0], Relaxed);
        channel.point_args[1].store(args[1], Relaxed);
        kernel.arch.doorbell(Doorbell::Point);
    }

    #[inline]
    pub(super) fn progress<A: Arch>(kernel: &Kernel<A>) {
        let progress = &kernel.arch.channel().progress;
        progress.store(progress.load(Relaxed).wrapping_add(1), Relaxed);
    }
}
