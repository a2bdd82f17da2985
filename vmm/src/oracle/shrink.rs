//! A case that can be made smaller: first whole stretches of steps are left out, then each step is simplified by proptest,
//! and so on until nothing helps.

use proptest::strategy::ValueTree;

use super::case::Step;

type Element = Box<dyn ValueTree<Value = Step>>;

/// The tree of a case.
pub(super) struct Tree {
    /// Each step, and whether it is still there.
    steps: Vec<(Element, bool)>,
    stage: Stage,
    /// What the last [`Tree::simplify`] did.
    last: Option<Last>,
    /// Something has become smaller since all was tried.
    is_smaller: bool,
}

/// What is tried next.
#[derive(Clone, Copy)]
enum Stage {
    /// Leave out `len` of the steps that are there, from the `at`-th on. Counted from the end, so that what a step
    /// needs is left out after it.
    LeaveOut { len: usize, at: usize },
    /// Simplify this step.
    Simplify(usize),
}

enum Last {
    LeftOut(Vec<usize>),
    Simplified(usize),
}

impl Tree {
    pub(super) fn new(steps: Vec<Element>) -> Self {
        let len = steps.len().div_ceil(2);
        Self {
            steps: steps.into_iter().map(|step| (step, true)).collect(),
            stage: Stage::LeaveOut { len, at: 0 },
            last: None,
            is_smaller: false,
        }
    }

    /// Places of the steps that are there, the last first.
    fn there(&self) -> Vec<usize> {
        let all = (0..self.steps.len()).rev();
        all.filter(|place| self.steps[*place].1).collect()
    }

    fn leave_out(&mut self, mut len: usize, mut at: usize) -> bool {
        let there = self.there();
        loop {
            if len == 0 {
                self.stage = Stage::Simplify(0);
                return false;
            }
            if at < there.len() {
                break;
            }
            (len, at) = (len / 2, 0);
        }
        let gone = there[at..there.len().min(at + len)].to_vec();
        for place in &gone {
            self.steps[*place].1 = false;
        }
        // If that is too much they come back, and the next stretch is tried; else it has moved here.
        self.stage = Stage::LeaveOut { len, at };
        self.last = Some(Last::LeftOut(gone));
        true
    }

    /// The case as it is now.
    pub(super) fn current(&self) -> Vec<Step> {
        let there = self.steps.iter().filter(|(_, is_there)| *is_there);
        there.map(|(step, _)| step.current()).collect()
    }

    /// Makes it smaller. False where nothing is left to try.
    pub(super) fn simplify(&mut self) -> bool {
        // It was not too much.
        self.is_smaller |= self.last.take().is_some();
        loop {
            if let Stage::LeaveOut { len, at } = self.stage
                && self.leave_out(len, at)
            {
                return true;
            }
            while let Stage::Simplify(place) = self.stage {
                let Some((step, is_there)) = self.steps.get_mut(place) else {
                    break;
                };
                if *is_there && step.simplify() {
                    self.last = Some(Last::Simplified(place));
                    return true;
                }
                self.stage = Stage::Simplify(place + 1);
            }
            // Simpler steps may need fewer others.
            if !std::mem::take(&mut self.is_smaller) {
                return false;
            }
            self.stage = Stage::LeaveOut { len: 1, at: 0 };
        }
    }

    /// Takes a part of the last step back, which was too much. False where it is as it was before that step.
    pub(super) fn complicate(&mut self) -> bool {
        match self.last.take() {
            None => false,
            Some(Last::LeftOut(gone)) => {
                if let Stage::LeaveOut { at, .. } = &mut self.stage {
                    *at += gone.len();
                }
                for place in gone {
                    self.steps[place].1 = true;
                }
                false
            }
            Some(Last::Simplified(place)) => {
                if self.steps[place].0.complicate() {
                    self.last = Some(Last::Simplified(place));
                    return true;
                }
                self.stage = Stage::Simplify(place + 1);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use abi::oracle::Residency;

    use super::*;
    use crate::oracle::case::Value;
    use crate::oracle::generate::Generator;

    /// Shrinks case `index` of 50 steps for as long as `fails` says so.
    fn shrunk(index: u64, fails: impl Fn(&[Step]) -> bool) -> (Vec<Step>, u32) {
        let mut tree = Generator::new(1, 50, Residency::Same).tree(index);
        let (mut best, mut tries) = (tree.current(), 0);
        assert!(fails(&best));
        while tree.simplify() {
            loop {
                tries += 1;
                let now = tree.current();
                if fails(&now) {
                    best = now;
                    break;
                }
                if !tree.complicate() {
                    break;
                }
            }
        }
        (best, tries)
    }

    #[test]
    fn only_what_matters_is_left() {
        let stores = |steps: &[Step]| {
            let is_store = |step: &&Step| matches!(step, Step::Store(_, value) if *value >= 100);
            steps.iter().filter(is_store).count()
        };
        for index in 0..20 {
            if stores(&Generator::new(1, 50, Residency::Same).tree(index).current()) < 2 {
                continue;
            }
            let (steps, tries) = shrunk(index, |steps| stores(steps) >= 2);
            let arena = Value::new(abi::oracle::Mode::Arena, 0, 0);
            let smallest = Step::Store(arena, 100);
            assert_eq!(steps, [smallest.clone(), smallest], "case {index}");
            assert!(tries < 600, "{tries}");
        }
    }
}
