//! Failures as a choice of the campaign: which passage of a failpoint fails in which execution.

use std::mem::offset_of;

use abi::channel::Control;
use abi::failpoint::Failpoint;
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE};

use super::rng::Rng;
use crate::memory::PhysMem;
use crate::scenario::Fail;

/// Keeps these draws apart from those of the schedule of the same execution.
const SALT: u64 = 0x6661_696c_2d61_6e79;

/// Armed so that it counts passages and fails none.
pub(super) const COUNTING: u32 = u32::MAX;

/// Passages that can be chosen to fail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Passages(Vec<Fail>);

impl Passages {
    /// Reads from guest memory how often each of `counting`, armed for [`COUNTING`] passages, was passed.
    pub(super) fn read(memory: &dyn PhysMem, counting: &[Fail]) -> Self {
        let passed = |fail: &Fail| {
            let counter = offset_of!(Control, fail) + 4 * fail.failpoint as usize;
            let gpa = CHANNEL_GPA + fail.vcpu as u64 * CHANNEL_STRIDE + counter as u64;
            let mut left = [0; 4];
            match memory.read(gpa, &mut left) {
                Ok(()) => COUNTING - u32::from_le_bytes(left),
                Err(_) => 0,
            }
        };
        let seen = counting.iter().map(|fail| Fail {
            // Other schedules may have one more.
            passage: passed(fail).saturating_add(1),
            ..*fail
        });
        Self(seen.collect())
    }

    /// The last passage of each that can be chosen.
    #[cfg(test)]
    pub(super) fn all(self) -> Vec<Fail> {
        self.0
    }

    /// What fails in execution `index` of `seed`; none where nothing was asked for.
    pub(super) fn draw(&self, seed: u64, index: u64) -> Option<Fail> {
        let all = self.0.iter().map(|fail| u64::from(fail.passage)).sum();
        if all == 0 {
            return None;
        }
        let mut at = Rng::new(seed ^ SALT, index).below(all);
        for fail in &self.0 {
            match at.checked_sub(u64::from(fail.passage)) {
                Some(left) => at = left,
                None => {
                    return Some(Fail {
                        passage: at as u32 + 1,
                        ..*fail
                    });
                }
            }
        }
        None
    }
}

/// Each of `failpoints` on each vCPU, counting, but where `fixed` has armed it already.
pub(super) fn counting(failpoints: &[Failpoint], vcpus: usize, fixed: &[Fail]) -> Vec<Fail> {
    let mut all: Vec<Fail> = Vec::new();
    for &failpoint in failpoints {
        for vcpu in 0..vcpus {
            let fail = Fail {
                failpoint,
                vcpu,
                passage: COUNTING,
            };
            let same = |other: &Fail| (other.failpoint, other.vcpu) == (failpoint, vcpu);
            if !all.iter().chain(fixed).any(same) {
                all.push(fail);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_passage_is_drawn_and_one_seed_draws_the_same() {
        let fail = |failpoint, vcpu, passage| Fail {
            failpoint,
            vcpu,
            passage,
        };
        let passages = Passages(vec![
            fail(Failpoint::FrameAlloc, 0, 5),
            fail(Failpoint::FrameAlloc, 1, 1),
            fail(Failpoint::SlabAlloc, 1, 3),
        ]);
        let drawn: HashSet<String> = (0..1_000)
            .map(|index| passages.draw(7, index).unwrap().to_string())
            .collect();
        assert_eq!(drawn.len(), 9, "{drawn:?}");
        assert!(drawn.contains("frame-alloc@0:5") && drawn.contains("slab-alloc@1:3"));
        assert!(!drawn.iter().any(|fail| fail.ends_with(":0")));
        assert_eq!(passages.draw(7, 3), passages.draw(7, 3));
        assert_eq!(Passages::default().draw(7, 3), None);
    }

    #[test]
    fn what_is_armed_already_is_not_drawn() {
        let fixed = ["slab-alloc@1:4".parse().unwrap()];
        let names = [Failpoint::SlabAlloc, Failpoint::SlabAlloc];
        let all = counting(&names, 3, &fixed);
        let vcpus: Vec<usize> = all.iter().map(|fail| fail.vcpu).collect();
        assert_eq!(vcpus, [0, 2]);
    }
}
