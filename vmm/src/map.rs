//! A map from words to small values, for what is done for every event.
//!
//! Its entries lie one after the other, and a table of their numbers, by hash, says which is whose. That is less memory to
//! touch than a hash map of the usual kind has, of which a schedule looks into many; and to clear or to copy one, as a reset does,
//! is to clear or copy two short arrays.

/// Spreads keys that differ in any bits over the upper ones (Fibonacci hashing).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// Length of the table of an empty map, as a power of two.
const LEAST: u32 = 4;

/// See the module.
#[derive(Debug)]
pub(crate) struct Map<V> {
    entries: Vec<(u64, V)>,
    /// Numbers of entries, from 1; 0: none. Twice as long as there are entries at least, and a power of two.
    table: Vec<u32>,
    shift: u32,
}

/// A set of words.
pub(crate) type Set = Map<()>;

impl<V> Default for Map<V> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            table: vec![0; 1 << LEAST],
            shift: u64::BITS - LEAST,
        }
    }
}

impl<V: Copy> Clone for Map<V> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            table: self.table.clone(),
            shift: self.shift,
        }
    }
    /// Keeps its memory, and a table that has grown.
    fn clone_from(&mut self, from: &Self) {
        self.entries.clone_from(&from.entries);
        if self.shift == from.shift {
            self.table.copy_from_slice(&from.table);
        } else {
            self.number();
        }
    }
}

impl<V: Copy> Map<V> {
    fn home(&self, key: u64) -> usize {
        (key.wrapping_mul(SPREAD) >> self.shift) as usize
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.table.len() - 1)
    }

    /// The index of an entry and its place in the table; otherwise the place where it would be.
    #[inline]
    fn find(&self, key: u64) -> Result<(usize, usize), usize> {
        let mut at = self.home(key);
        loop {
            let number = self.table[at] as usize;
            if number == 0 {
                return Err(at);
            }
            if self.entries[number - 1].0 == key {
                return Ok((number - 1, at));
            }
            at = self.after(at);
        }
    }

    /// What is known of `key`.
    #[inline]
    pub(crate) fn get(&self, key: u64) -> Option<&V> {
        let (index, _) = self.find(key).ok()?;
        Some(&self.entries[index].1)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        let (index, _) = self.find(key).ok()?;
        Some(&mut self.entries[index].1)
    }

    #[inline]
    pub(crate) fn contains(&self, key: u64) -> bool {
        self.find(key).is_ok()
    }

    /// What is known of `key`, and whether that was there before; otherwise it is `value` now.
    #[inline]
    pub(crate) fn entry(&mut self, key: u64, value: V) -> (&mut V, bool) {
        let (index, known) = match self.find(key) {
            Ok((index, _)) => (index, true),
            Err(at) => (self.add(at, key, value), false),
        };
        (&mut self.entries[index].1, known)
    }

    /// Makes it `value`: what it was.
    #[inline]
    pub(crate) fn insert(&mut self, key: u64, value: V) -> Option<V> {
        let (now, known) = self.entry(key, value);
        known.then(|| std::mem::replace(now, value))
    }

    fn add(&mut self, at: usize, key: u64, value: V) -> usize {
        self.entries.push((key, value));
        self.table[at] = self.entries.len() as u32;
        if 2 * self.entries.len() > self.table.len() {
            self.number();
        }
        self.entries.len() - 1
    }

    /// Fills the table anew, and makes it long enough.
    #[cold]
    fn number(&mut self) {
        while 2 * self.entries.len() > self.table.len() {
            self.shift -= 1;
            self.table.resize(2 * self.table.len(), 0);
        }
        self.table.fill(0);
        for index in 0..self.entries.len() {
            let mut at = self.home(self.entries[index].0);
            while self.table[at] != 0 {
                at = self.after(at);
            }
            self.table[at] = index as u32 + 1;
        }
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<V> {
        let (index, at) = self.find(key).ok()?;
        self.close(at);
        let last = self.entries.len() - 1;
        if index < last {
            let (_, place) = self.find(self.entries[last].0).expect("it is an entry");
            self.table[place] = index as u32 + 1;
        }
        Some(self.entries.swap_remove(index).1)
    }

    /// Takes what is at `at` out of the table: whatever was put behind it for want of that place moves up.
    fn close(&mut self, at: usize) {
        let mask = self.table.len() - 1;
        let (mut gap, mut next) = (at, self.after(at));
        while self.table[next] != 0 {
            let home = self.home(self.entries[self.table[next] as usize - 1].0);
            if next.wrapping_sub(home) & mask >= next.wrapping_sub(gap) & mask {
                self.table[gap] = self.table[next];
                gap = next;
            }
            next = self.after(next);
        }
        self.table[gap] = 0;
    }

    pub(crate) fn retain(&mut self, mut keeps: impl FnMut(u64, &V) -> bool) {
        let before = self.entries.len();
        self.entries.retain(|(key, value)| keeps(*key, value));
        if self.entries.len() != before {
            self.number();
        }
    }

    pub(crate) fn clear(&mut self) {
        if !self.entries.is_empty() {
            self.entries.clear();
            self.table.fill(0);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All of it, in an order that only what was done before decides.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.entries.iter().map(|(key, value)| (*key, value))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u8),
        Remove(u64),
        Retain(u8),
        Clear,
        Copy,
    }

    fn key() -> impl Strategy<Value = u64> {
        // Some share a place, and some are as large as words are.
        prop_oneof![
            0u64..40,
            (0u64..40).prop_map(|page| page << 12),
            (0u64..4).prop_map(|back| u64::MAX - back),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (key(), any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
            6 => key().prop_map(Step::Remove),
            1 => any::<u8>().prop_map(Step::Retain),
            1 => Just(Step::Clear),
            2 => Just(Step::Copy),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec(step(), 0..200)) {
            let (mut map, mut copy) = (Map::default(), Map::default());
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(key, value) => {
                        prop_assert_eq!(map.insert(key, value), model.insert(key, value));
                    }
                    Step::Remove(key) => prop_assert_eq!(map.remove(key), model.remove(&key)),
                    Step::Retain(most) => {
                        map.retain(|_, value| *value <= most);
                        model.retain(|_, value| *value <= most);
                    }
                    Step::Clear => {
                        map.clear();
                        model.clear();
                    }
                    Step::Copy => {
                        copy.clone_from(&map);
                        std::mem::swap(&mut map, &mut copy);
                    }
                }
                let mut all: Vec<_> = map.iter().map(|(key, value)| (key, *value)).collect();
                all.sort_unstable();
                prop_assert_eq!(all, model.iter().map(|(key, value)| (*key, *value)).collect::<Vec<_>>());
                for (key, value) in &model {
                    prop_assert_eq!(map.get(*key), Some(value));
                }
                prop_assert_eq!((map.len(), map.contains(41)), (model.len(), false));
            }
        }
    }
}
