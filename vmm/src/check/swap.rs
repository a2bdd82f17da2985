//! S-20 and on: swap slots, the swap cache and the LRU lists.

use std::collections::{BTreeMap, HashSet};

use abi::layout::PAGE_SHIFT;
use abi::objects::{FrameKind, lru};
use abi::pte::NonPresent;

use super::non_present::said;
use super::writeback::disk_file;
use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::{FolioView, SlotView};

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "S-20",
        family: Family::NonPresent,
        predicate: "a swap slot counts the entries that name it, and every slot that is named exists",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/swapfile.c, swap_duplicate; abi::objects::SwapSlot::count",
        run: slots_count_entries,
    },
    Invariant {
        id: "S-21",
        family: Family::NonPresent,
        predicate: "a slot's folio is in the swap cache for it, and a folio in the cache is its slot's",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/swap_state.c, __add_to_swap_cache",
        run: cache_agrees,
    },
    Invariant {
        id: "S-22",
        family: Family::NonPresent,
        predicate: "the swap area counts the slots that are named or cached",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/swapfile.c, swap_usage_in_pages",
        run: used_slots_counted,
    },
    Invariant {
        id: "S-23",
        family: Family::NonPresent,
        predicate: "with swap every anonymous folio, and every page of a file on the disk, is on exactly one LRU list, and nothing else is",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/swap.c, folio_add_lru; include/linux/mm_inline.h, lruvec_add_folio",
        run: listed_once,
    },
    Invariant {
        id: "S-24",
        family: Family::NonPresent,
        predicate: "a folio that nobody maps is cached for a slot that an entry names",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/swap_state.c, free_swap_cache",
        run: cached_for_somebody,
    },
];

fn slots_count_entries(context: &Context<'_>, findings: &mut Findings) {
    let swap = &context.snapshot.swap;
    let mut named = BTreeMap::<u64, u64>::new();
    let leaves = context.spaces.iter().flat_map(|space| &space.user.absent);
    for leaf in leaves {
        if let Some(NonPresent::Swap { slot, .. }) = said(leaf) {
            *named.entry(slot).or_default() += 1;
        }
    }
    let slots = swap.slots.as_deref().unwrap_or(&[]);
    for (slot, SlotView { count, .. }) in (0..).zip(slots) {
        let entries = named.remove(&slot).unwrap_or(0);
        findings.require(u64::from(*count) == entries, || {
            about(slot, "a swap slot miscounts the entries that name it")
                .expected(format!("count = {entries}"))
                .found(format!("count = {count}"))
        });
    }
    for (slot, entries) in named {
        findings.report(|| {
            about(slot, "entries name a swap slot that there is not")
                .expected(format!("a slot below {}", slots.len()))
                .found(format!("{entries} entries"))
        });
    }
    findings.require(swap.slots.is_some(), || {
        Finding::new("the array of swap slots does not lie in memory")
            .expected("an array in guest memory")
            .found(format!("{} slots", swap.nr_slots))
    });
}

fn cache_agrees(context: &Context<'_>, findings: &mut Findings) {
    let slots = context.snapshot.swap.slots.as_deref().unwrap_or(&[]);
    for (slot, SlotView { folio: gpa, .. }) in (0..).zip(slots) {
        if *gpa == 0 {
            continue;
        }
        let back = context
            .snapshot
            .folio(*gpa)
            .and_then(crate::inspect::FolioView::swap_slot);
        findings.require(back == Some(slot), || {
            about(slot, "a swap slot names a folio that is not cached for it")
                .expected(format!(
                    "frame {:#x} cached for slot {slot}",
                    gpa >> PAGE_SHIFT
                ))
                .found(format!("for {back:?}"))
        });
    }
    for folio in context.anonymous_folios() {
        let Some(slot) = folio.swap_slot() else {
            continue;
        };
        let of_slot = usize::try_from(slot).ok().and_then(|slot| slots.get(slot));
        findings.require(of_slot.is_some_and(|of| of.folio == folio.gpa()), || {
            about(
                slot,
                "a folio is in the swap cache for a slot that does not know it",
            )
            .expected(format!("slot {slot} names frame {:#x}", folio.frame))
            .found(format!("{of_slot:x?}"))
            .frame(folio.frame)
        });
    }
}

fn used_slots_counted(context: &Context<'_>, findings: &mut Findings) {
    let swap = &context.snapshot.swap;
    let slots = swap.slots.as_deref().unwrap_or(&[]);
    let used = slots
        .iter()
        .filter(|slot| slot.count != 0 || slot.folio != 0);
    let used = used.count() as u64;
    findings.require(swap.used == used, || {
        Finding::new("the swap area miscounts its slots")
            .expected(format!("used = {used}"))
            .found(format!("used = {}", swap.used))
    });
}

fn listed_once(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let mut listed = HashSet::new();
    for (number, list) in snapshot.swap.lists.iter().enumerate() {
        let name = lru::NAMES[number];
        let (mut previous, mut next, mut count) = (0, list.first, 0);
        while next != 0 {
            let folio = snapshot.folios.get(next as usize);
            let wrong = match folio {
                None => Some("which does not exist"),
                Some(_) if !listed.insert(next) => Some("which is listed already"),
                Some(folio) if !folio.is(FrameKind::Anon) && !may_be_listed(context, folio) => {
                    Some("which is neither anonymous nor of a file on the disk")
                }
                Some(folio) if !folio.is_listed() || folio.prev != previous => {
                    Some("which does not know")
                }
                Some(folio) if lru::list_of(folio.state, folio.is(FrameKind::File)) != number => {
                    Some("which belongs on another one")
                }
                Some(_) => None,
            };
            if let Some(wrong) = wrong {
                findings.report(|| {
                    Finding::new(format!("the {name} list leads to a wrong frame"))
                        .expected("folios that can be reclaimed, each once, linked both ways")
                        .found(format!("frame {next:#x}, {wrong}"))
                        .frame(next)
                });
                return;
            }
            count += folio.map_or(0, |folio| 1 << folio.order.min(63));
            previous = next;
            next = folio.map_or(0, |folio| folio.next);
        }
        findings.require((list.last, list.count) == (previous, count), || {
            Finding::new(format!("the {name} list is not what its head says"))
                .expected(format!("last = {previous:#x}, count = {count}"))
                .found(format!("last = {:#x}, count = {}", list.last, list.count))
        });
    }
    let pages = snapshot.folios.iter();
    let pages = pages.filter(|folio| disk_file(context, folio).is_some());
    for folio in context.anonymous_folios().chain(pages) {
        let is_listed = listed.contains(&folio.frame);
        let is_wanted = snapshot.swap.is_on();
        findings.require(is_listed == is_wanted, || {
            Finding::new("a folio that reclaim does not find, or should not")
                .expected(if is_wanted { "on a list" } else { "on none" })
                .found(if is_listed { "on a list" } else { "on none" })
                .frame(folio.frame)
        });
    }
}

/// A page of a file on the disk, or one that has left its file and is in use still.
fn may_be_listed(context: &Context<'_>, folio: &FolioView) -> bool {
    folio.is(FrameKind::File) && (folio.owner == 0 || disk_file(context, folio).is_some())
}

fn cached_for_somebody(context: &Context<'_>, findings: &mut Findings) {
    let slots = context.snapshot.swap.slots.as_deref().unwrap_or(&[]);
    for folio in context.anonymous_folios() {
        let Some(slot) = folio.swap_slot().filter(|_| folio.mapcount == 0) else {
            continue;
        };
        let count = slots.get(slot as usize).map_or(0, |slot| slot.count);
        findings.require(count != 0, || {
            about(slot, "a folio is cached for nobody: a leak")
                .expected("an entry that names its slot, or a mapping")
                .found("neither")
                .frame(folio.frame)
        });
    }
}

fn about(slot: u64, summary: &str) -> Finding {
    Finding::new(format!("{summary}: slot {slot:#x}"))
}
