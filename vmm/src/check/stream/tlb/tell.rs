//! The words in which a violation is told.

use abi::pte::{NonPresent, Pte, PteFlags};

use super::TlbModel;
use super::held::{Change, Held, Rights};
use super::vcpu::Flush;
use crate::check::Finding;
use crate::check::stream::Seen;

impl TlbModel {
    /// That `vcpu` may hold a translation whose frame or page `why` (a clause).
    pub(super) fn tell(&self, vcpu: usize, held: &Held, why: &str) -> Finding {
        let (start, end) = (held.gva, held.gva.saturating_add(held.bytes()));
        Finding::new(format!(
            "vCPU {vcpu} may still translate {start:#x} to {} that {why}",
            page(held.level)
        ))
        .expected(format!(
            "a flush of {start:#x}..{end:#x} of mm {} on vCPU {vcpu} since the entry changed",
            held.mm
        ))
        .found(format!(
            "none: it may hold {}, which could be cached {}; {}",
            translation(held),
            self.since(held.since),
            self.taken(held)
        ))
        .mm(held.mm)
        .gva(start)
        .frame(held.entry.leaf_address(held.level) >> 12)
        .vcpu(vcpu)
        .detail(self.last_flush(vcpu))
        .details(self.fates(held))
    }

    /// What the tables no longer say of `held` (a clause): where the page is mapped still, it is rights that are gone.
    pub(super) fn gone(&self, held: &Held) -> String {
        let tables = &self.now.state.tables;
        let root = tables.roots.get(held.mm);
        let leaf = root.and_then(|&root| tables.leaf(root, held.gva).ok());
        let rights = leaf.filter(|leaf| {
            let at = held.gva & (abi::pte::level_size(leaf.level) - 1);
            leaf.pte.leaf_address(leaf.level) + at == held.entry.leaf_address(held.level)
        });
        let Some(now) = rights.map(|leaf| leaf.rights) else {
            return "has left the tables".into();
        };
        let lost: Vec<&str> = [
            (Rights::USER, "reached by programs"),
            (Rights::WRITE, "written"),
            (Rights::FETCH, "executed"),
        ]
        .into_iter()
        .filter(|(right, _)| held.rights.contains(*right) && !now.contains(*right))
        .map(|(_, done)| done)
        .collect();
        match &lost[..] {
            // Another part of a larger page is what has changed.
            [] => "has left the tables".into(),
            lost => format!(
                "is mapped still, and may no longer be {}",
                lost.join(" or ")
            ),
        }
    }

    /// What became of the frame since the entry changed.
    fn fates(&self, held: &Held) -> Vec<String> {
        let since = held.change().map_or(held.since, |change| change.at);
        let fates = self.now.fates.iter();
        fates
            .filter(|fate| fate.change.at > since && held.covers_frame(fate.gpa, fate.bytes))
            .map(|fate| {
                let Change { vcpu, task, at, .. } = fate.change;
                format!(
                    "its frame was {} by vCPU {vcpu} (task {task}, {})",
                    if fate.freed {
                        "freed"
                    } else {
                        "allocated again"
                    },
                    self.event(at)
                )
            })
            .collect()
    }

    /// That `vcpu` may hold a pointer to a table.
    pub(super) fn tell_pointer(&self, vcpu: usize, held: &Held, what: String) -> Finding {
        let table = held.entry.address();
        Finding::new(what)
            .expected(format!("a flush on vCPU {vcpu} since the table was unlinked"))
            .found(format!(
                "none: its paging-structure caches may hold the pointer to the level-{} table {table:#x} for {:#x}, {}; {}",
                held.level - 1,
                held.gva,
                self.since(held.since),
                self.taken(held)
            ))
            .mm(held.mm)
            .gva(held.gva)
            .frame(table >> 12)
            .vcpu(vcpu)
            .detail(self.last_flush(vcpu))
    }

    fn taken(&self, held: &Held) -> String {
        match held.change() {
            Some(Change { vcpu, task, at, .. }) => {
                let what = if held.taken.is_some() {
                    "changed the entry"
                } else {
                    "unlinked the table it lies in"
                };
                format!("vCPU {vcpu} (task {task}) {what} ({})", self.event(at))
            }
            None => "an entry above it was changed".into(),
        }
    }

    fn last_flush(&self, vcpu: usize) -> String {
        match self.now.state.vcpus[vcpu].last_flush {
            None => format!("vCPU {vcpu} has not flushed since the start"),
            Some((flush, at)) => {
                let what = match flush {
                    Flush::Invlpg(start, end) => format!("INVLPG {start:#x}..{end:#x}"),
                    Flush::Current => "a load of CR3".into(),
                    Flush::Address(pcid, start, end) => {
                        format!("INVPCID of {start:#x}..{end:#x} in PCID {pcid}")
                    }
                    Flush::Pcid(pcid) => format!("INVPCID of PCID {pcid}"),
                    Flush::AllAndGlobal => "INVPCID of everything".into(),
                    Flush::Fault(gva) => format!("a page fault at {gva:#x}"),
                    Flush::All => "INVPCID of everything but global pages".into(),
                };
                format!(
                    "the last flush on vCPU {vcpu} was {what} ({})",
                    self.event(at)
                )
            }
        }
    }

    fn since(&self, at: u64) -> String {
        if at == 0 {
            "from the start on".into()
        } else {
            format!("from {} on", self.event(at))
        }
    }

    /// An event, by its number in the schedule.
    pub(super) fn event(&self, at: u64) -> String {
        match at.checked_sub(self.begins) {
            None | Some(0) => format!("event {at} of the set-up"),
            Some(number) => format!("event {number}"),
        }
    }
}

fn page(level: u8) -> &'static str {
    match level {
        1 => "a frame",
        2 => "a 2 MiB page",
        _ => "a 1 GiB page",
    }
}

/// A translation that may be cached: with the rights of its whole walk.
fn translation(held: &Held) -> String {
    let mut text = format!("{} ", frame(held.entry, held.level));
    for (right, letter) in [
        (Rights::USER, 'U'),
        (Rights::WRITE, 'W'),
        (Rights::FETCH, 'X'),
    ] {
        text.push(if held.rights.contains(right) {
            letter
        } else {
            '-'
        });
    }
    text
}

fn frame(entry: Pte, level: u8) -> String {
    let size = match level {
        1 => "",
        2 => "2 MiB at ",
        _ => "1 GiB at ",
    };
    format!("{size}frame {:#x}", entry.leaf_address(level) >> 12)
}

pub(super) fn who(seen: &Seen) -> String {
    format!("vCPU {} (task {})", seen.vcpu, seen.event.task)
}

/// An entry as the tables have it.
pub(super) fn describe(entry: Pte, level: u8) -> String {
    match entry.non_present() {
        Some(NonPresent::Swap { slot, .. }) => return format!("swap slot {slot:#x}"),
        Some(NonPresent::Migration { gpa, .. }) => {
            return format!("migration of frame {:#x}", gpa >> 12);
        }
        None if entry.is_none() => return "nothing".into(),
        None if !entry.is_present() => return format!("{:#x}, not present", entry.0),
        None => {}
    }
    if level > 1 && !entry.is_leaf(level) {
        return format!("a table at {:#x}", entry.address());
    }
    let flags = entry.flags();
    let mut text = format!("{} ", frame(entry, level));
    for (flag, letter) in [
        (PteFlags::USER, 'U'),
        (PteFlags::WRITE, 'W'),
        (PteFlags::NO_EXECUTE, 'N'),
    ] {
        text.push(if flags.contains(flag) { letter } else { '-' });
    }
    text
}
