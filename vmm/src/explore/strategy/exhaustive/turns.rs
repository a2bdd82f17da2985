//! Whose turn it is where nobody gets anywhere.

use std::hash::Hasher as _;

use rustc_hash::FxHasher;

/// The driver's fairness is no part of the state: where all who run only wait for anyone, it lets each have
/// its turn, and in the end calls it a livelock. This is what it goes by.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    /// vCPUs that have run, the last of them last.
    order: Vec<u8>,
}

impl Turns {
    pub(super) fn begin(&mut self) {
        self.order.clear();
    }

    pub(super) fn ran(&mut self, vcpu: u8) {
        if self.order.last() != Some(&vcpu) {
            self.order.retain(|other| *other != vcpu);
            self.order.push(vcpu);
        }
    }

    /// A fingerprint of it, after so many idle turns; 0 where somebody has just done something, for then
    /// turns are counted anew.
    pub(super) fn print(&self, idle_turns: u64) -> u32 {
        if idle_turns == 0 {
            return 0;
        }
        let mut hash = FxHasher::default();
        hash.write_u64(idle_turns);
        hash.write(&self.order);
        (hash.finish() >> 32) as u32 | 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_number_of_idle_turns_tell_them_apart() {
        let turns = |vcpus: &[u8]| {
            let mut turns = Turns::default();
            vcpus.iter().for_each(|vcpu| turns.ran(*vcpu));
            turns
        };
        assert_eq!(turns(&[0, 1]).print(0), turns(&[1, 0]).print(0));
        assert_ne!(turns(&[0, 1]).print(1), turns(&[1, 0]).print(1));
        assert_ne!(turns(&[0, 1]).print(1), turns(&[0, 1]).print(2));
        assert_eq!(turns(&[1, 0, 0, 1]).print(1), turns(&[0, 1]).print(1));
        let mut again = turns(&[1, 0]);
        again.begin();
        assert_eq!(again.print(1), turns(&[]).print(1));
    }
}
