//! The model against the brute-force MMU, in both directions.

use std::collections::BTreeSet;

use abi::channel::cr3;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::held::{Change, Rights};
use super::history::{Step, history};
use super::laws::{Law, Laws};
use super::reference::{self, Allowed, Mmu, POOLS, Told, VCPUS};
use super::state::State;
use super::vcpu::Flush;

/// What the model says after `steps`.
fn model_after(steps: &[Step], laws: Laws) -> State {
    let mut state = State::new(VCPUS);
    state.laws = laws;
    for mm in 0..2 {
        state
            .tables_mut()
            .roots
            .insert(mm as u64 + 1, reference::root(mm));
    }
    for vcpu in &mut state.vcpus {
        vcpu.place(0, reference::KERNEL, 0);
    }
    // The kernel's view of memory: it sees what it writes and what it reads when it writes.
    let mut memory = Mmu::new(Default::default());
    for (at, step) in steps.iter().enumerate() {
        let at = at as u64 + 1;
        let told = memory.step(step);
        if let Told::Change {
            mm,
            gva,
            level,
            old,
            new,
        } = told
        {
            let change = Change {
                vcpu: 0,
                task: 1,
                at,
                guarded: true,
            };
            assert_eq!(state.change((mm, level, gva), old, new, change), Ok(()));
        }
        tell(&mut state, step, at);
    }
    state
}

fn tell(state: &mut State, step: &Step, at: u64) {
    let page = reference::page;
    match *step {
        Step::Write { .. } | Step::Use { .. } => {}
        Step::Load {
            vcpu,
            mm,
            pcid,
            keep,
        } => {
            let no_flush = if keep { cr3::NO_FLUSH } else { 0 };
            let id = if mm < 2 { mm as u64 + 1 } else { 0 };
            state.load(vcpu, reference::root(mm) | pcid | no_flush, id, at);
        }
        Step::Invlpg { vcpu, page: number } => {
            state.flush(vcpu, Flush::Invlpg(page(number), page(number) + 0x1000), at);
        }
        Step::Invpcid {
            vcpu,
            pcid,
            page: number,
        } => {
            let flush = Flush::Address(pcid, page(number), page(number) + 0x1000);
            state.flush(vcpu, flush, at);
        }
        Step::Context { vcpu, pcid } => state.flush(vcpu, Flush::Pcid(pcid), at),
        Step::All {
            vcpu,
            global: false,
        } => state.flush(vcpu, Flush::All, at),
        Step::All { vcpu, global: true } => state.flush(vcpu, Flush::AllAndGlobal, at),
        Step::Fault { vcpu, page: number } => state.flush(vcpu, Flush::Fault(page(number)), at),
    }
}

fn allowed(rights: Rights) -> Allowed {
    (
        rights.contains(Rights::WRITE),
        rights.contains(Rights::USER),
        rights.contains(Rights::FETCH),
        rights.contains(Rights::DIRTY),
    )
}

/// Whoever may use one of `all` may do at least what `it` permits.
fn permits(all: &BTreeSet<(u64, Allowed)>, it: &(u64, Allowed)) -> bool {
    let (frame, (w, u, x, d)) = *it;
    all.iter().any(|(other, (ow, ou, ox, od))| {
        *other == frame && *ow >= w && *ou >= u && *ox >= x && *od >= d
    })
}

/// The first difference between the model with `laws` and the MMU.
fn difference(steps: &[Step], laws: Laws) -> Option<String> {
    let (mmu, state) = (Mmu::after(steps), model_after(steps, laws));
    for vcpu in 0..VCPUS {
        for number in 0..8 {
            let gva = reference::page(number);
            let legal = mmu.translations(vcpu, gva);
            let mut says = BTreeSet::new();
            state.vcpus[vcpu].translate(gva, &state.tables, |frame, rights| {
                says.insert((frame, allowed(rights)));
            });
            if let Some(it) = legal.iter().find(|it| !permits(&says, it)) {
                return Some(format!(
                    "vCPU {vcpu} may translate {gva:#x} to {it:x?}: {says:x?}"
                ));
            }
            if let Some(it) = says.iter().find(|it| !permits(&legal, it)) {
                return Some(format!(
                    "vCPU {vcpu} never translates {gva:#x} to {it:x?}: {legal:x?}"
                ));
            }
        }
        let (legal, says) = (mmu.tables(vcpu), pointers(&state, vcpu));
        if legal != says {
            return Some(format!(
                "vCPU {vcpu} may point to {legal:x?}, not {says:x?}"
            ));
        }
    }
    None
}

/// The tables to which the model says that a vCPU may hold a pointer.
fn pointers(state: &State, vcpu: usize) -> BTreeSet<u64> {
    let context = state.vcpus[vcpu].loaded();
    let mut all: BTreeSet<u64> = context
        .pointers
        .iter()
        .map(|it| it.entry.address())
        .collect();
    let mut reached = vec![(context.root, 4)];
    while let Some((table, level)) = reached.pop() {
        for (_, entry) in state.tables.present(table) {
            if !entry.pte.is_leaf(level) {
                all.insert(entry.pte.address());
                reached.push((entry.pte.address(), level - 1));
            }
        }
    }
    all.retain(|table| POOLS.iter().flatten().any(|it| it == table));
    all
}

proptest! {
    // More where PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(4_000)))]

    /// The model says that a vCPU may translate a page to a frame, with these rights, exactly where some legal
    /// content of its TLB does; likewise of pointers to tables.
    #[test]
    fn the_model_is_exact(steps in history()) {
        prop_assert_eq!(difference(&steps, Laws::default()), None);
    }
}

/// Each law matters, and the histories above are rich enough to show it.
#[test]
fn a_model_without_one_of_the_laws_is_found_out() {
    for law in Law::EVERY {
        let laws = Laws { broken: Some(law) };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let config = Config {
            cases: 20_000,
            max_shrink_iters: 0,
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, rng);
        let same = runner.run(&history(), |steps| {
            let difference = difference(&steps, laws);
            difference.map_or(Ok(()), |it| Err(TestCaseError::fail(it)))
        });
        assert!(same.is_err(), "{law:?} makes no difference");
    }
}
