//! Draws cases: case number i of a seed is always the same.

use abi::layout::{HUGE_PAGE_SIZE as HUGE, PAGE_SIZE};
use abi::oracle::{Mode, Residency};
use abi::syscall::{advice, map, nr, prot};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::calls::{CALLS, NOT_YET, file, index_of, offset, place, resource_and_limit};
use super::case::{self, Step, Value};
use super::shrink::Tree;
use crate::explore::rng::Rng;

/// Steps of a child are at most this many.
const MAX_BODY: usize = 10;
/// Children of children of children there are none.
const DEPTH: u32 = 2;

/// Draws cases.
pub(super) struct Generator {
    seed: u64,
    steps: usize,
    step: BoxedStrategy<Step>,
    residency: Residency,
    /// What three quarters of the cases begin with: a file that has pages.
    file: Vec<BoxedStrategy<Step>>,
    /// What one in eight begins with: 2 MiB of the arena in one folio.
    huge: Vec<BoxedStrategy<Step>>,
}

impl Generator {
    /// Of cases with `steps` steps, none of them open (`case::is_open`).
    pub(super) fn new(seed: u64, steps: usize, residency: Residency) -> Self {
        Self {
            seed,
            steps,
            step: step(DEPTH),
            residency,
            file: file_with_pages(),
            huge: huge_pages(),
        }
    }

    /// Case number `index`, which can be shrunk.
    pub(super) fn tree(&self, index: u64) -> Tree {
        let mut rng = Rng::new(self.seed, index);
        let mut seed = [0; 32];
        for bytes in seed.chunks_exact_mut(8) {
            bytes.copy_from_slice(&rng.next().to_le_bytes());
        }
        let from_seed = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), from_seed);
        let (mut steps, mut drawn) = (Vec::new(), Vec::new());
        let mut begin = |with: &[BoxedStrategy<Step>]| {
            if steps.len() + with.len() < self.steps {
                for step in with {
                    let tree = step.new_tree(&mut runner).expect("nothing is filtered");
                    drawn.push(tree.current());
                    steps.push(tree);
                }
            }
        };
        if !rng.next().is_multiple_of(4) {
            begin(&self.file);
        }
        if rng.next().is_multiple_of(8) {
            begin(&self.huge);
        }
        let mut count = steps.len();
        while count < self.steps {
            let tree = self
                .step
                .new_tree(&mut runner)
                .expect("nothing is filtered");
            drawn.push(tree.current());
            let more = case::count(&drawn[drawn.len() - 1..]);
            // A fork that does not fit any more gives way to something smaller, one of two kinds of advice that do not go together to
            // something else.
            if count + more <= self.steps && !case::is_open(&drawn, self.residency) {
                count += more;
                steps.push(tree);
            } else {
                drawn.pop();
            }
        }
        Tree::new(steps)
    }
}

fn step(depth: u32) -> BoxedStrategy<Step> {
    let calls = CALLS
        .iter()
        .enumerate()
        .filter(|(_, call)| !NOT_YET.contains(&call.nr))
        .map(|(index, call)| {
            let draw = (call.draw)().prop_map(move |args| Step::Call { call: index, args });
            (call.weight, draw.boxed())
        });
    let word = || prop_oneof![4 => Just(0), 1 => select_word()];
    let near = || prop_oneof![12 => place(), 1 => far_below()];
    let load = (near(), word()).prop_map(|(place, word)| Step::Load(place.plus(word)));
    let store = (near(), word(), 1u64..1 << 16)
        .prop_map(|(place, word, value)| Step::Store(place.plus(word), value));
    let check = (place(), 1u64..=12).prop_map(|(place, pages)| Step::Check(place, pages));
    let mut all: Vec<(u32, BoxedStrategy<Step>)> = calls.collect();
    all.push((10, load.boxed()));
    all.push((26, store.boxed()));
    all.push((5, check.boxed()));
    let value = || 1u64..1 << 16;
    let load = (file(), offset()).prop_map(|(file, offset)| Step::FileLoad(file, offset));
    let store = (file(), offset(), value())
        .prop_map(|(file, offset, value)| Step::FileStore(file, offset, value));
    all.push((3, load.boxed()));
    all.push((5, store.boxed()));
    let limit = resource_and_limit().prop_map(|(resource, bytes)| Step::Limit(resource, bytes));
    all.push((1, limit.boxed()));
    if depth > 0 {
        let body = vec(step(depth - 1), 0..=MAX_BODY);
        all.push((3, body.prop_map(Step::Fork).boxed()));
    }
    proptest::strategy::Union::new_weighted(all).boxed()
}

fn call(nr: u64, args: Vec<Value>) -> Step {
    Step::Call {
        call: index_of(nr),
        args,
    }
}

fn file_with_pages() -> Vec<BoxedStrategy<Step>> {
    let made = call(
        nr::MEMFD_CREATE,
        vec![Value::new(Mode::Name, 0, 0), Value::raw(0)],
    );
    let sized = (1u64..=16).prop_map(move |pages| {
        let size = Value::raw(pages * PAGE_SIZE);
        call(nr::FTRUNCATE, vec![Value::new(Mode::File, 0, 0), size])
    });
    vec![Just(made).boxed(), sized.boxed()]
}

fn huge_pages() -> Vec<BoxedStrategy<Step>> {
    let arena = |page: u64| Value::new(Mode::Arena, 0, page * PAGE_SIZE);
    let map = select(vec![HUGE, HUGE + 3 * PAGE_SIZE, 2 * HUGE]).prop_map(move |bytes| {
        // Not counted against the memory that there is.
        let flags = map::PRIVATE | map::ANONYMOUS | map::NORESERVE | map::FIXED;
        let rest = [bytes, prot::READ | prot::WRITE, flags, u64::MAX, 0];
        let args = [arena(0)].into_iter().chain(rest.map(Value::raw));
        call(nr::MMAP, args.collect())
    });
    // It has an anon_vma then, with or without folios of 2 MiB.
    let store = (0u64..32, 1u64..1 << 16).prop_map(move |(page, it)| Step::Store(arena(page), it));
    let args = vec![arena(0), Value::raw(HUGE), Value::raw(advice::COLLAPSE)];
    vec![
        map.boxed(),
        store.boxed(),
        Just(call(nr::MADVISE, args)).boxed(),
    ]
}

/// A word of a page that is not its first.
fn select_word() -> BoxedStrategy<u64> {
    prop_oneof![Just(8), Just(PAGE_SIZE / 2), Just(PAGE_SIZE - 8)].boxed()
}

/// Where only a stack that grows has something.
fn far_below() -> BoxedStrategy<Value> {
    (place(), 1u64..600)
        .prop_map(|(place, pages)| place.plus((pages * PAGE_SIZE).wrapping_neg()))
        .boxed()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::oracle::case::line;

    #[test]
    fn a_seed_gives_the_same_cases_and_another_one_others() {
        let case = |seed, index| {
            Generator::new(seed, 50, Residency::Same)
                .tree(index)
                .current()
        };
        assert_eq!(case(1, 7), case(1, 7));
        assert_ne!(case(1, 7), case(1, 8));
        assert_ne!(case(1, 7), case(2, 7));
    }

    #[test]
    fn a_case_has_exactly_as_many_steps_as_were_asked_for() {
        for steps in [1, 2, 50] {
            let generator = Generator::new(3, steps, Residency::Same);
            for index in 0..50 {
                assert_eq!(case::count(&generator.tree(index).current()), steps);
            }
        }
    }

    #[test]
    fn no_case_is_open() {
        for residency in [Residency::Same, Residency::Open] {
            let generator = Generator::new(1, 50, residency);
            let mut cases = (0..200).map(|index| generator.tree(index).current());
            assert!(!cases.any(|steps| case::is_open(&steps, residency)));
        }
    }

    #[test]
    fn everything_is_drawn_before_long() {
        let generator = Generator::new(1, 50, Residency::Same);
        let (mut calls, mut words, mut depth) = (BTreeSet::new(), BTreeSet::new(), 0);
        fn visit(steps: &[Step], level: usize, see: &mut impl FnMut(&Step, usize)) {
            for step in steps {
                see(step, level);
                if let Step::Fork(body) = step {
                    visit(body, level + 1, see);
                }
            }
        }
        for index in 0..200 {
            visit(&generator.tree(index).current(), 0, &mut |step, level| {
                if let Step::Call { call, .. } = step {
                    calls.insert(*call);
                }
                words.extend(
                    line(step)
                        .split(['(', ',', ' ', '|', '+', '-', '['])
                        .map(str::to_owned),
                );
                depth = depth.max(level);
            });
        }
        assert_eq!(calls.len(), CALLS.len());
        assert_eq!(depth, DEPTH as usize);
        for word in [
            "arena",
            "placed",
            "heap",
            "top",
            "GROWSDOWN",
            "DONTNEED",
            "fork",
            "SHARED",
            "file",
            "limit",
            "FREE",
            "MEMLOCK",
            "PAGEOUT",
            "COLLAPSE",
        ] {
            assert!(
                words.iter().any(|it| it.contains(word)),
                "no {word}: {words:?}"
            );
        }
    }
}
