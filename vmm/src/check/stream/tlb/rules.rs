//! What must hold, event by event.

use abi::channel::access;
use abi::disk::DiskOp;
use abi::layout::PAGE_SIZE;
use abi::objects::FrameKind;
use abi::pte::Pte;
use abi::syscall::{advice, clone, decode, map, mremap, nr};

use super::held::{Change, Held, Rights};
use super::state::{State, exceeds};
use super::tell::{describe, who};
use super::vcpu::Vcpu;
use super::{
    ATTACHED, FREED, FREED_MAPPED, FREED_TABLE, IMPOSSIBLE, LAZY, REPLACED, RETURNED, REUSED,
    TWO_SIZES, TlbModel, UNEXPLAINED, UNLISTED, WRITTEN_BACK, bit, violation,
};
use crate::check::stream::Seen;
use crate::check::{Finding, Violation};

/// Everything that a translation covers.
const EVERYTHING: (u64, u64) = (0, u64::MAX);
/// Advice that takes pages, or the right to write them, away.
const TAKES_AWAY: [u64; 3] = [advice::DONTNEED, advice::DONTNEED_LOCKED, advice::FREE];

impl TlbModel {
    pub(super) fn pte_change(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, gva, level, old, new] = seen.event.args;
        let level = level.clamp(1, 4) as u8;
        let gva = gva & !(abi::pte::level_size(level) - 1);
        let by = self.change_of(seen);
        let change = Change {
            guarded: self.now.state.mmap_locks.guards(mm, by.task),
            ..by
        };
        let (old, new) = (Pte(old), Pte(new));
        let place = (mm, level, gva);
        if let Err(known) = self.now.state.change(place, old, new, change) {
            found.push(violation(
                UNEXPLAINED,
                Finding::new("an entry was changed that was not what the events say it was")
                    .expected(describe(known, level))
                    .found(describe(old, level))
                    .mm(mm)
                    .gva(gva)
                    .vcpu(seen.vcpu),
            ));
        }
        if level == 2 && new.is_present() {
            self.two_sizes(seen, mm, gva, new, found);
        }
    }

    /// The page at `gva` is mapped in the size that `new` says. Which of two a processor uses that holds both is not defined
    /// (SDM vol. 3A, 5.10.2.3), and some stop over it (AMD erratum 383; Linux __split_huge_pmd_locked).
    fn two_sizes(&self, seen: &Seen, mm: u64, gva: u64, new: Pte, found: &mut Vec<Violation>) {
        let state = &self.now.state;
        if new.is_table() && state.tables.used(new.address()) == 0 {
            return;
        }
        let end = gva.saturating_add(abi::pte::level_size(2));
        let other = if new.is_leaf(2) { 1 } else { 2 };
        let is_other = |held: &&Held| {
            held.is_leaf() && held.level == other && held.mm == mm && held.overlaps(gva, end)
        };
        for (index, vcpu) in state.vcpus.iter().enumerate() {
            if !vcpu.runs_user() {
                continue;
            }
            if let Some(held) = vcpu.usable().find(is_other) {
                let finding = self.tell(index, held, "is mapped in another size now");
                let finding = finding.detail(format!("mapped by {}", who(seen)));
                found.push(violation(TWO_SIZES, finding));
                return;
            }
        }
    }

    pub(super) fn frame_free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, order, kind, ..] = seen.event.args;
        let bytes = PAGE_SIZE << order.min(10);
        if FrameKind::from_u64(kind).is_some_and(FrameKind::is_table) {
            return self.table_free(seen, gpa, found);
        }
        // A lazy vCPU runs no user code, and what another PCID has cached is out of reach: both have to flush
        // before that changes.
        let holder = first(&mut self.now.state.vcpus, |_, vcpu| {
            miss(vcpu.leaves_mut(), |held| held.covers_frame(gpa, bytes))
        });
        if let Some((index, held)) = holder {
            found.push(violation(
                FREED,
                self.tell(index, &held, "is freed")
                    .frame(gpa >> 12)
                    .detail(format!("freed by {}", who(seen))),
            ));
            return;
        }
        if FrameKind::from_u64(kind).is_some_and(FrameKind::is_user) {
            let entries = self.now.state.tables.mappings(gpa, bytes);
            if entries > 0 {
                found.push(still_mapped(seen, gpa, entries));
            }
        }
    }

    fn table_free(&mut self, seen: &Seen, gpa: u64, found: &mut Vec<Violation>) {
        let is_pointer = |held: &Held| held.entry.address() == gpa;
        let holder = first(&mut self.now.state.vcpus, |_, vcpu| {
            miss(vcpu.pointers_mut(), is_pointer)
        });
        let mut vcpus = self.now.state.vcpus.iter();
        let loaded = vcpus.position(|vcpu| vcpu.loaded().root == gpa);
        let links = self.now.state.tables.links(gpa);
        if let Some((index, held)) = holder {
            let is_lazy = self.now.state.vcpus[index].lazy;
            let what = format!(
                "a page-table page is freed that vCPU {index}{} may still walk",
                if is_lazy { ", which is lazy," } else { "" }
            );
            found.push(violation(
                FREED_TABLE,
                self.tell_pointer(index, &held, what)
                    .detail(format!("freed by {}", who(seen))),
            ));
        } else if let Some(index) = loaded {
            found.push(violation(
                FREED_TABLE,
                Finding::new(format!("the level-4 table in CR3 of vCPU {index} is freed"))
                    .frame(gpa >> 12)
                    .vcpu(index)
                    .detail(format!("freed by {}", who(seen))),
            ));
        } else if links > 0 {
            found.push(still_mapped(seen, gpa, links.into()));
        }
        let change = self.change_of(seen);
        self.now.state.table_freed(gpa, change);
    }

    /// The range and what counts in it, of a call that takes something away.
    pub(super) fn call_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [number, result, ..] = seen.event.args;
        let Some(call) = self.now.calls.remove(seen.event.task.into()) else {
            return;
        };
        let [_, start, len, third, fourth] = call.args;
        let from = |start: u64, len: u64| (start, start.saturating_add(len));
        let (range, also) = match (number, decode(result)) {
            // It may have gone half its way.
            (nr::MPROTECT, Err(_)) => (from(start, len), None),
            (_, Err(_)) => return,
            (nr::MUNMAP | nr::MPROTECT | nr::TESTBED_MIGRATE, _) => (from(start, len), None),
            (nr::MADVISE, _) if TAKES_AWAY.contains(&third) => (from(start, len), None),
            // Where it shrinks or moves the old place is gone, and what a fixed place held.
            (nr::MREMAP, Ok(returned)) => {
                let fixed = fourth & mremap::FIXED != 0;
                (from(start, len), fixed.then(|| from(returned, third)))
            }
            (nr::MMAP, Ok(returned)) if fourth & map::FIXED != 0 => (from(returned, len), None),
            (nr::FORK | nr::BRK, _) => (EVERYTHING, None),
            (nr::CLONE, _) if start & clone::VM == 0 => (EVERYTHING, None),
            _ => return,
        };
        let mm = self.now.state.vcpus[seen.vcpu].loaded().mm;
        let task = seen.event.task;
        // What a concurrent operation took away after this call began is that operation's to flush. Who moves pages does not answer
        // for those that it found gone already either: it promises nothing of them (Linux's migrate_pages). Nor does who has failed, and brk
        // does not say here what it took.
        let answers_for_gone =
            decode(result).is_ok() && !matches!(number, nr::TESTBED_MIGRATE | nr::BRK);
        let faults = &self.now.faults;
        let blamed = |held: &Held, change: Change| {
            // What a fault of another task is replacing is its own to flush, whenever it began (T-05).
            let is_of_fault = faults
                .get(change.task.into())
                .is_some_and(|fault| change.at > fault.at);
            let is_gone = answers_for_gone && change.at < call.at && !is_of_fault;
            held.mm == mm && (change.task == task || is_gone)
        };
        let mut ranges = [Some(range), also].into_iter().flatten();
        let found_at =
            ranges.find_map(|range| holder(&mut self.now.state, range, |_| true, blamed));
        if let Some((index, held)) = found_at {
            found.push(violation(
                RETURNED,
                self.tell(index, &held, &self.gone(&held))
                    .detail(format!("the call returned on {}", who(seen))),
            ));
        }
    }

    pub(super) fn fault_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let task = seen.event.task;
        let Some(fault) = self.now.faults.remove(task.into()) else {
            return;
        };
        let blamed = |_: &Held, change: Change| change.task == task && change.at > fault.at;
        let found_at = holder(
            &mut self.now.state,
            EVERYTHING,
            |index| index != seen.vcpu,
            blamed,
        );
        if let Some((index, held)) = found_at {
            found.push(violation(
                REPLACED,
                self.tell(index, &held, "was replaced by a fault")
                    .detail(format!("the fault was handled by {}", who(seen))),
            ));
        }
    }

    pub(super) fn attach(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, _, start, end, _] = seen.event.args;
        // What is unmapped by its folio, and not yet flushed, belongs to the mapping still, which may be linked in anew,
        // merged or split.
        let blamed = |held: &Held, change: Change| held.mm == mm && change.guarded;
        if let Some((index, held)) = holder(&mut self.now.state, (start, end), |_| true, blamed) {
            found.push(violation(
                ATTACHED,
                self.tell(index, &held, "belongs to a mapping that is gone")
                    .detail(format!("mapped again by {}", who(seen))),
            ));
        }
    }

    /// A VMA has new bounds or other rights: what is mapped next to it may have become part of it, so the same holds as
    /// where one is linked in. But the call that does it may be in the middle of a change of its own, which it has yet to flush.
    pub(super) fn resized(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, _, start, end, _] = seen.event.args;
        let task = seen.event.task;
        let run = &self.now;
        let begun = run
            .calls
            .get(task.into())
            .or_else(|| run.faults.get(task.into()));
        let since = begun.map_or(0, |begun| begun.at);
        let blamed = |held: &Held, change: Change| {
            let is_own = change.task == task && change.at >= since;
            held.mm == mm && change.guarded && !is_own
        };
        if let Some((index, held)) = holder(&mut self.now.state, (start, end), |_| true, blamed) {
            found.push(violation(
                ATTACHED,
                self.tell(index, &held, "belongs to a mapping that is gone")
                    .detail(format!(
                        "a mapping was put in its place or changed by {}",
                        who(seen)
                    )),
            ));
        }
    }

    pub(super) fn cr3_load(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [cr3, mm, ..] = seen.event.args;
        let (state, at) = (&mut self.now.state, self.now.at);
        state.load(seen.vcpu, cr3, mm, at);
        state.vcpus[seen.vcpu].lazy = false;
        let mask = state.masks.get(mm).copied().unwrap_or(0);
        if mm != 0 && mask & bit(seen.vcpu) == 0 {
            found.push(violation(
                UNLISTED,
                Finding::new(format!(
                    "vCPU {} loads the page tables of mm {mm} and is not in its cpumask: no flush will reach it",
                    seen.vcpu
                ))
                .expected(format!("bit {}", seen.vcpu))
                .found(format!("{mask:#b}"))
                .mm(mm)
                .vcpu(seen.vcpu),
            ));
        }
        let state = &self.now.state;
        let is_wrong = |held: &&Held| {
            if !held.is_leaf() {
                // A processor walks whatever it runs.
                return held.missed || mm != 0 && held.mm != mm;
            }
            let (of_user, of_other) = (held.rights.contains(Rights::USER), held.mm != mm);
            mm != 0
                && (held.missed || of_other && of_user)
                && exceeds(&state.tables, mm, held, EVERYTHING, Rights::PROGRAM)
        };
        let held = state.vcpus[seen.vcpu].usable().find(is_wrong).copied();
        if let Some(held) = held {
            let (whose, index) = (held.mm, seen.vcpu);
            let finding = if held.is_leaf() {
                let why = if whose == mm {
                    "it missed while the PCID was not loaded".into()
                } else {
                    format!("mm {whose} left there: mm {mm} is loaded without a flush")
                };
                self.tell(index, &held, &why)
            } else {
                let what = format!("vCPU {index} loads a PCID in which mm {whose} left pointers");
                self.tell_pointer(index, &held, what)
            };
            found.push(violation(REUSED, finding));
        }
    }

    /// A page of a file goes to the disk: what is written to it from now on must be told by a fault, or it is lost.
    pub(super) fn written_back(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [op, _, gpa, bytes, is_page] = seen.event.args;
        if op != DiskOp::Write as u64 || is_page == 0 {
            return;
        }
        let holder = first(&mut self.now.state.vcpus, |_, vcpu| {
            miss(vcpu.leaves_mut(), |held| {
                held.rights.contains(Rights::WRITE) && held.covers_frame(gpa, bytes)
            })
        });
        if let Some((index, held)) = holder {
            found.push(violation(
                WRITTEN_BACK,
                self.tell(index, &held, "is being written back, and write")
                    .detail(format!("the disk was asked by {}", who(seen))),
            ));
        }
    }

    pub(super) fn access(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gva, frame, _, how, _] = seen.event.args;
        if how & access::FAULT != 0 {
            return;
        }
        let mut needed = Rights::USER;
        if how & access::WRITE != 0 {
            needed = needed.or(Rights::WRITE);
        }
        let state = &self.now.state;
        let vcpu = &state.vcpus[seen.vcpu];
        let mut is_possible = false;
        vcpu.translate(gva, &state.tables, |gpa, rights| {
            is_possible |= gpa == frame && rights.contains(needed);
        });
        if !is_possible && !vcpu.is_unknown(gva) {
            found.push(violation(
                IMPOSSIBLE,
                Finding::new(format!(
                    "vCPU {} used a translation of {gva:#x} that it cannot hold: the soft TLB and the model disagree",
                    seen.vcpu
                ))
                .expected("a translation of the tables, or one that no flush has covered")
                .found(format!("frame {:#x}", frame >> 12))
                .gva(gva)
                .frame(frame >> 12)
                .vcpu(seen.vcpu),
            ));
        }
    }

    pub(super) fn leave_lazy(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let state = &mut self.now.state;
        state.vcpus[seen.vcpu].lazy = false;
        let vcpu = &state.vcpus[seen.vcpu];
        // What nobody has answered for yet may still be flushed: whoever took it away sees that this vCPU is no
        // longer lazy.
        let is_wrong = |held: &&Held| {
            held.is_leaf()
                && held.missed
                && exceeds(&state.tables, held.mm, held, EVERYTHING, Rights::PROGRAM)
        };
        let held = vcpu.usable().find(is_wrong).copied();
        if let Some(held) = held {
            found.push(violation(
                LAZY,
                self.tell(seen.vcpu, &held, "left the tables while it was lazy"),
            ));
        }
    }
}

/// The first vCPU that runs user code, of those asked for, that may use in `range` what `counts`, though the
/// tables no longer say so. Those that cannot use it now have missed it.
fn holder(
    state: &mut State,
    range: (u64, u64),
    asked: impl Fn(usize) -> bool,
    counts: impl Fn(&Held, Change) -> bool,
) -> Option<(usize, Held)> {
    let tables = &state.tables;
    first(&mut state.vcpus, |index, vcpu| {
        let held = miss(vcpu.leaves_mut(), |held| {
            held.overlaps(range.0, range.1)
                && held.change().is_some_and(|change| counts(held, change))
                && exceeds(tables, held.mm, held, range, Rights::PROGRAM)
        });
        held.filter(|_| asked(index))
    })
}

/// Asks every vCPU, and gives the first answer.
fn first(
    vcpus: &mut [Vcpu],
    mut ask: impl FnMut(usize, &mut Vcpu) -> Option<Held>,
) -> Option<(usize, Held)> {
    let mut first = None;
    for (index, vcpu) in vcpus.iter_mut().enumerate() {
        let held = ask(index, vcpu).map(|held| (index, held));
        first = first.or(held);
    }
    first
}

/// The first that `counts` of what can be used now. The others that count are missed.
fn miss<'a>(
    all: impl Iterator<Item = (bool, &'a mut Held)>,
    counts: impl Fn(&Held) -> bool,
) -> Option<Held> {
    let mut first = None;
    for (usable, held) in all {
        if counts(held) {
            if !usable {
                held.missed = true;
            } else if first.is_none() {
                first = Some(*held);
            }
        }
    }
    first
}

fn still_mapped(seen: &Seen, gpa: u64, entries: u64) -> Violation {
    violation(
        FREED_MAPPED,
        Finding::new("a frame is freed that page tables map")
            .expected("no present entry")
            .found(format!("{entries} entries"))
            .frame(gpa >> 12)
            .vcpu(seen.vcpu),
    )
}
