//! The lock of one VMA, with the mmap_lock that its writer holds.

use abi::objects::VmaRefs;
use guest_kernel::sync::vma_lock;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::word::{ACQUIRE, LoomWord, NOTHING, RELEASE, assert_broken, explore};

struct Shared<const LEFT_OUT: u8> {
    refs: LoomWord<LEFT_OUT>,
    vma: LoomWord<LEFT_OUT>,
    mm: LoomWord<LEFT_OUT>,
    /// What the VMA says. loom fails where two threads touch it with no order between them.
    data: UnsafeCell<u64>,
}

// SAFETY: whether the lock keeps accesses apart is what is tested: loom looks at each.
unsafe impl<const LEFT_OUT: u8> Sync for Shared<LEFT_OUT> {}

impl<const LEFT_OUT: u8> Shared<LEFT_OUT> {
    fn new(refs: u64) -> Arc<Self> {
        Arc::new(Self {
            refs: LoomWord::new(refs),
            vma: LoomWord::new(0),
            mm: LoomWord::new(2),
            data: UnsafeCell::new(0),
        })
    }

    fn change(&self) {
        // SAFETY: the caller holds the VMA for writing, or loom says that it does not.
        self.data.with_mut(|data| unsafe { *data += 1 });
    }

    /// What a fault does (`Kernel::lock_vma_under_rcu`).
    fn read(&self) -> Option<u64> {
        vma_lock::try_read(&self.refs).ok()?;
        let seen = (!vma_lock::is_written(&self.vma, &self.mm))
            // SAFETY: as above, not alone.
            .then(|| self.data.with(|data| unsafe { *data }));
        vma_lock::release(&self.refs);
        seen
    }

    fn exclude(&self) {
        vma_lock::exclude(&self.refs);
        while !vma_lock::is_alone(&self.refs) {
            thread::yield_now();
        }
    }

    /// What a writer does, under the mmap_lock: changes the VMA once it has locked it.
    fn write(&self) {
        vma_lock::begin(&self.mm);
        self.exclude();
        vma_lock::note(&self.vma, &self.mm);
        vma_lock::admit(&self.refs);
        self.change();
        vma_lock::end(&self.mm);
    }
}

fn a_writer_and_readers<const LEFT_OUT: u8>() {
    let shared = Shared::<LEFT_OUT>::new(VmaRefs::ATTACHED);
    let readers =
        [shared.clone(), shared.clone()].map(|shared| thread::spawn(move || shared.read()));
    shared.write();
    for reader in readers {
        assert!(reader.join().unwrap().is_none_or(|seen| seen <= 1));
    }
    assert_eq!(shared.read(), Some(1), "the write is over");
}

/// A VMA is made, and linked in: who reads it sees it whole.
fn a_new_one<const LEFT_OUT: u8>() {
    let shared = Shared::<LEFT_OUT>::new(VmaRefs::DETACHED);
    let other = shared.clone();
    let reader = thread::spawn(move || other.read());
    vma_lock::begin(&shared.mm);
    shared.change();
    vma_lock::note(&shared.vma, &shared.mm);
    vma_lock::admit(&shared.refs);
    vma_lock::end(&shared.mm);
    assert!(reader.join().unwrap().is_none_or(|seen| seen == 1));
}

/// A VMA is taken out, and is another one at once: nobody reads it who has found the first.
fn a_recycled_one<const LEFT_OUT: u8>() {
    let shared = Shared::<LEFT_OUT>::new(VmaRefs::ATTACHED);
    let other = shared.clone();
    let reader = thread::spawn(move || other.read());
    vma_lock::begin(&shared.mm);
    shared.exclude();
    vma_lock::note(&shared.vma, &shared.mm);
    vma_lock::admit(&shared.refs);
    shared.exclude();
    vma_lock::detach(&shared.refs);
    shared.change();
    vma_lock::note(&shared.vma, &shared.mm);
    vma_lock::admit(&shared.refs);
    vma_lock::end(&shared.mm);
    assert!(reader.join().unwrap().is_none_or(|seen| seen <= 1));
}

#[test]
fn a_writer_is_apart_from_readers_before_and_after_it() {
    explore(a_writer_and_readers::<NOTHING>);
    assert_broken(a_writer_and_readers::<ACQUIRE>);
    assert_broken(a_writer_and_readers::<RELEASE>);
}

#[test]
fn a_new_vma_is_read_whole() {
    explore(a_new_one::<NOTHING>);
    assert_broken(a_new_one::<ACQUIRE>);
    assert_broken(a_new_one::<RELEASE>);
}

#[test]
fn a_recycled_vma_is_not_read_as_what_it_was() {
    explore(a_recycled_one::<NOTHING>);
    assert_broken(a_recycled_one::<ACQUIRE>);
    assert_broken(a_recycled_one::<RELEASE>);
}

#[test]
fn readers_are_refused_by_what_the_word_says() {
    use vma_lock::Refused::{Detached, Excluded};
    let word = std::sync::atomic::AtomicU64::new(VmaRefs::DETACHED);
    assert_eq!(vma_lock::try_read(&word), Err(Detached));
    vma_lock::admit(&word);
    assert_eq!(vma_lock::try_read(&word), Ok(()));
    vma_lock::exclude(&word);
    assert!(!vma_lock::is_alone(&word), "one reader is left");
    assert_eq!(vma_lock::try_read(&word), Err(Excluded));
    vma_lock::release(&word);
    assert!(vma_lock::is_alone(&word));
    vma_lock::detach(&word);
    assert_eq!(vma_lock::try_read(&word), Err(Detached));
}
