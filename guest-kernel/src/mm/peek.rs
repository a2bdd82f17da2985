//! Reading another process's memory without its locks and without a reference to it: a walker that only RCU
//! protects.
//!
//! The mm is found on the list of mms, and the tables on the way down to the leaf, by links alone, while the
//! process may unmap and exit; the leaf entry is read under its table's lock, and so is the word behind it
//! (Linux's pte_offset_map_lock, whose tables may go by pte_free_defer). No flush waits for this walk: its CPU need not have the
//! mm loaded.

use abi::channel::Walker;
use abi::objects::Mm;
use abi::point::Point;
use abi::syscall::Errno;

use super::{Field, Slot};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::rcu::RcuReader;
use abi::pte::level_size;

impl<A: Arch> Kernel<A> {
    /// The 8 aligned bytes at `gva` of the mm with number `id`.
    ///
    /// # Errors
    /// ESRCH where there is no such mm (any more), EFAULT where nothing is present there.
    pub(crate) fn peek(&self, id: u64, gva: u64) -> Result<u64, Errno> {
        let section = self.rcu_read();
        let mm = self.mm_by_id(&section, id).ok_or(Errno::ESRCH)?;
        let mm = self.obj(mm);
        self.walk_begins(mm, gva, Walker::Peek);
        let word = self.peek_in(&section, mm, gva);
        self.walk_ends(mm, gva, Walker::Peek);
        word.ok_or(Errno::EFAULT)
    }

    fn peek_in(&self, _section: &RcuReader<'_, A>, mm: &Mm, gva: u64) -> Option<u64> {
        let mut table = mm.pgd.get();
        for level in [4, 3, 2] {
            let slot = Slot::new(table, level, gva);
            let entry = self.read_pte(slot);
            point!(self, Point::WalkStep, [table, u64::from(level)]);
            if !entry.is_present() {
                return None;
            }
            if !entry.is_table() {
                let _guard = self.lock_upper(mm);
                return self.word_behind(slot, gva);
            }
            table = entry.address();
        }
        // Whoever holds it waits for no grace period, as `sync::rcu` demands.
        let _guard = self.lock_table(table);
        // A collapse may have set the table aside, and it may serve another address since (Linux's
        // pte_offset_map_lock looks again too).
        if self.leaf_table(mm, gva) != Ok(table) {
            return None;
        }
        self.word_behind(Slot::new(table, 1, gva), gva)
    }

    /// The word that the leaf entry `slot` maps at `gva`. Under its page-table lock.
    fn word_behind(&self, slot: Slot, gva: u64) -> Option<u64> {
        let entry = self.read_pte(slot);
        let is_leaf = entry.is_present() && entry.is_leaf(slot.level);
        let offset = gva % level_size(slot.level);
        is_leaf.then(|| {
            self.memory_word(entry.leaf_address(slot.level) + offset)
                .get()
        })
    }
}
