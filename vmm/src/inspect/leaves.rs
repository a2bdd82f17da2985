//! The pages of an address space, packed: eight bytes a page where pages lie side by side.
//!
//! What a walk of a full 4 GiB finds is a million [`Leaf`]s of 40 bytes; writing those to fresh memory
//! costs far more than reading the tables does.

use abi::pte::{Pte, level_size};

use super::visit::Leaf;

/// Leaves in the order in which they were met.
#[derive(Clone, Debug, Default)]
pub struct Leaves {
    runs: Vec<Run>,
    entries: Vec<Pte>,
}

/// Leaves of one table side by side.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The first one.
    first: Leaf,
    /// Its place in [`Leaves::entries`].
    at: usize,
    /// Address after the last one: what the next leaf of this run translates.
    next_gva: u64,
}

impl Leaves {
    /// Adds a leaf.
    #[inline]
    pub fn push(&mut self, leaf: Leaf) {
        let next_gva = leaf.gva.wrapping_add(level_size(leaf.level));
        match self.runs.last_mut() {
            Some(run) if run.next_gva == leaf.gva && run.first.table_gpa == leaf.table_gpa => {
                run.next_gva = next_gva;
            }
            _ => self.runs.push(Run {
                first: leaf,
                at: self.entries.len(),
                next_gva,
            }),
        }
        self.entries.push(leaf.entry);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True where nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Leaf> {
        let ends = self.runs.iter().skip(1).map(|run| run.at);
        let runs = self.runs.iter().zip(ends.chain([self.entries.len()]));
        runs.flat_map(|(run, end)| {
            let size = level_size(run.first.level);
            let entries = self.entries[run.at..end].iter();
            (0..).zip(entries).map(move |(i, &entry)| Leaf {
                gva: run.first.gva.wrapping_add(i * size),
                entry,
                ..run.first
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inspect::walk::Rights;

    fn leaf(slot: u64, table: u64, level: u8) -> Leaf {
        Leaf {
            gva: (table << 30) + slot * level_size(level),
            level,
            above: Rights::ALL,
            entry: Pte(slot << 12 | table << 40 | 1),
            table_gpa: table << 12,
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            slots in prop::collection::vec((0u64..12, 1u64..4, 1u8..3), 0..80),
        ) {
            let all: Vec<_> = slots
                .into_iter()
                .map(|(slot, table, level)| leaf(slot, table << 1 | u64::from(level) & 1, level))
                .collect();
            let mut leaves = Leaves::default();
            all.iter().for_each(|&leaf| leaves.push(leaf));
            prop_assert_eq!(leaves.len(), all.len());
            prop_assert_eq!(leaves.is_empty(), all.is_empty());
            prop_assert_eq!(leaves.iter().collect::<Vec<_>>(), all);
        }
    }

    #[test]
    fn neighbours_of_one_table_share_a_run() {
        let mut leaves = Leaves::default();
        (0..512).for_each(|slot| leaves.push(leaf(slot, 1, 1)));
        leaves.push(leaf(0, 2, 1));
        assert_eq!(leaves.runs.len(), 2);
    }
}
