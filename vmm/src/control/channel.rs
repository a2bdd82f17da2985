//! The host's end of one vCPU's testbed channel. Nothing that the guest wrote is believed.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::{Control, Event, MAX_MESSAGE, RING_RECORDS, Report, ReportKind};
use abi::failpoint::Failpoint;
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::point::Point;

use super::stop::ProbeReport;
use crate::memory::{GuestRam, PhysMem};

/// Word of [`Control`] at a byte offset.
macro_rules! word {
    ($($field:tt)+) => { offset_of!(Control, $($field)+) / 8 };
}

/// The channel of one vCPU.
#[derive(Clone, Copy)]
pub(crate) struct Channel<'a> {
    ram: &'a GuestRam,
    control: &'a [AtomicU64; ENTRIES_PER_TABLE],
    ring: u64,
}

impl<'a> Channel<'a> {
    /// The channel of vCPU `vcpu`, below [`abi::layout::MAX_CPUS`].
    pub(crate) fn new(ram: &'a GuestRam, vcpu: usize) -> Self {
        let page = CHANNEL_GPA + vcpu as u64 * CHANNEL_STRIDE;
        Self {
            ram,
            control: ram
                .table(page)
                .expect("the least memory holds every channel"),
            ring: page + PAGE_SIZE,
        }
    }

    /// Points that always exit.
    pub(crate) fn set_traps(&self, mask: [u64; 4]) {
        for (word, bits) in mask.iter().enumerate() {
            self.control[word!(trap) + word].store(*bits, Relaxed);
        }
    }

    /// Points until the next exit.
    pub(crate) fn set_budget(&self, points: u64) {
        self.control[word!(budget)].store(points, Relaxed);
    }

    /// Points that are left until the next exit.
    pub(crate) fn budget(&self) -> u64 {
        self.control[word!(budget)].load(Relaxed)
    }

    /// Kinds of events that are recorded.
    pub(crate) fn set_event_mask(&self, mask: u64) {
        self.control[word!(event_mask)].store(mask, Relaxed);
    }

    /// Whether a full ring exits; the events so far count as consumed.
    pub(crate) fn set_ring_exits(&self, exits: bool) {
        self.consume_events();
        self.control[word!(ring_exits)].store(exits.into(), Relaxed);
    }

    /// True where a full ring exits.
    pub(crate) fn ring_exits(&self) -> bool {
        self.control[word!(ring_exits)].load(Relaxed) != 0
    }

    /// Takes all events so far off the ring.
    pub(crate) fn consume_events(&self) {
        let head = self.head();
        self.control[word!(ring_tail)].store(head, Relaxed);
    }

    /// Events from the consumer's position, or the last of them where the ring has gone round.
    pub(crate) fn unread_events(&self) -> Vec<Event> {
        self.events_from(self.control[word!(ring_tail)].load(Relaxed))
    }

    /// The events that are still in the ring, oldest first.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.events_from(0)
    }

    fn events_from(&self, first: u64) -> Vec<Event> {
        let head = self.head();
        let oldest = head.saturating_sub(RING_RECORDS as u64).max(first);
        (oldest..head)
            .filter_map(|sequence| {
                let slot = sequence % RING_RECORDS as u64;
                let gpa = self.ring + slot * size_of::<Event>() as u64;
                let event: Event = self.ram.read_value(gpa).ok()?;
                // Another number: torn, or not written by the kernel.
                (event.sequence == sequence).then_some(event)
            })
            .collect()
    }

    fn head(&self) -> u64 {
        // Acquire: pairs with the guest's release after it has written the record.
        self.control[word!(ring_head)].load(Acquire)
    }

    /// Points passed so far.
    pub(crate) fn points_passed(&self) -> u64 {
        self.control[word!(points_passed)].load(Relaxed)
    }

    /// Arms a failpoint.
    pub(crate) fn arm(&self, failpoint: Failpoint, passages: u32) {
        // Two of the array's 32-bit counters share a word.
        let (word, shift) = (failpoint as usize / 2, failpoint as usize % 2 * 32);
        let word = &self.control[word!(fail) + word];
        let kept = word.load(Relaxed) & !(u64::from(u32::MAX) << shift);
        word.store(kept | u64::from(passages) << shift, Relaxed);
    }

    /// What the watchdog looks at: any change is a sign of life.
    pub(crate) fn signs_of_life(&self) -> [u64; 3] {
        [
            self.control[word!(progress)].load(Relaxed),
            self.control[word!(points_passed)].load(Relaxed),
            self.head(),
        ]
    }

    /// The point that a doorbell is about, with its arguments.
    pub(crate) fn point(&self) -> Result<(Point, [u64; 2]), String> {
        let id = self.control[word!(point)].load(Relaxed);
        let args = [0, 1].map(|arg| self.control[word!(point_args) + arg].load(Relaxed));
        Point::from_id(id)
            .map(|point| (point, args))
            .ok_or_else(|| format!("the guest stopped at scheduling point {id}, which is none"))
    }

    /// The report that a doorbell is about.
    pub(crate) fn report(&self) -> Result<ProbeReport, String> {
        let field =
            |offset: usize| self.control[(offset_of!(Control, report) + offset) / 8].load(Relaxed);
        let kind = field(offset_of!(Report, kind));
        Ok(ProbeReport {
            kind: ReportKind::from_u64(kind).ok_or_else(|| {
                format!("the guest reported a finding of kind {kind}, which is none")
            })?,
            gva: field(offset_of!(Report, gva)),
            expected: field(offset_of!(Report, expected)),
            found: field(offset_of!(Report, found)),
            task: field(offset_of!(Report, task)),
        })
    }

    /// Text of the panic that a doorbell is about.
    pub(crate) fn message(&self) -> String {
        let len = self.control[word!(message_len)].load(Relaxed);
        let len = usize::try_from(len).unwrap_or(MAX_MESSAGE).min(MAX_MESSAGE);
        let bytes: Vec<u8> = self.control[word!(message)..][..MAX_MESSAGE / 8]
            .iter()
            .flat_map(|word| word.load(Relaxed).to_le_bytes())
            .take(len)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use abi::channel::EventKind;
    use abi::layout::MIN_MEMORY;
    use proptest::prelude::*;

    use super::*;

    const HEAD: u64 = CHANNEL_GPA + offset_of!(Control, ring_head) as u64;
    const RING: u64 = CHANNEL_GPA + PAGE_SIZE;

    fn record(ram: &GuestRam, sequence: u64) {
        let event = Event {
            kind: EventKind::Switch as u32,
            args: [sequence, 0, 0, 0, 0],
            sequence,
            ..Event::default()
        };
        let slot = sequence % RING_RECORDS as u64;
        ram.write_value(RING + slot * size_of::<Event>() as u64, &event)
            .unwrap();
        ram.write_value(HEAD, &(sequence + 1)).unwrap();
    }

    #[test]
    fn the_ring_gives_its_last_records_in_order() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        let channel = Channel::new(&ram, 0);
        assert_eq!(channel.events(), []);
        let total = RING_RECORDS as u64 + 5;
        for sequence in 0..total {
            record(&ram, sequence);
        }
        let sequences: Vec<_> = channel
            .events()
            .iter()
            .map(|event| event.sequence)
            .collect();
        assert_eq!(sequences, (5..total).collect::<Vec<_>>());
        channel.consume_events();
        record(&ram, total);
        let unread: Vec<_> = channel
            .unread_events()
            .iter()
            .map(|event| event.args[0])
            .collect();
        assert_eq!(unread, [total]);
    }

    #[test]
    fn a_record_with_another_number_is_left_out() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        for sequence in 0..3 {
            record(&ram, sequence);
        }
        let number = RING + 64 + offset_of!(Event, sequence) as u64;
        ram.write_value(number, &77_u64).unwrap();
        let left: Vec<_> = Channel::new(&ram, 0)
            .events()
            .iter()
            .map(|e| e.sequence)
            .collect();
        assert_eq!(left, [0, 2]);
    }

    #[test]
    fn unknown_numbers_are_named() {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        let channel = Channel::new(&ram, 1);
        let page = CHANNEL_GPA + CHANNEL_STRIDE;
        ram.write_value(page + offset_of!(Control, point) as u64, &12345_u64)
            .unwrap();
        assert!(channel.point().unwrap_err().contains("12345"));
        assert!(channel.report().unwrap_err().contains("kind 0"));
    }

    proptest! {
        /// Whatever the guest writes to its channel, the host reads bounded data.
        #[test]
        fn a_hostile_page_is_harmless(words in proptest::collection::vec(any::<u64>(), 512)) {
            let ram = GuestRam::new(MIN_MEMORY).unwrap();
            for (index, word) in words.iter().enumerate() {
                ram.write_value(CHANNEL_GPA + 8 * index as u64, word).unwrap();
            }
            let channel = Channel::new(&ram, 0);
            prop_assert!(channel.events().len() <= RING_RECORDS);
            prop_assert!(channel.unread_events().len() <= RING_RECORDS);
            // Each byte that is not UTF-8 becomes a replacement character of three.
            prop_assert!(channel.message().len() <= 3 * MAX_MESSAGE);
            prop_assert_eq!(channel.point().is_ok(), words[word!(point)] < Point::ALL.len() as u64);
        }
    }
}
