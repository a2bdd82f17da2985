//! What `stalemate inspect` shows: reports as values (for JSON), and as text for a person, at most 100
//! columns wide.

mod frame;
mod machine;
mod tree;

pub use frame::{FrameReport, MappingReport, RmapReport, folio_behind, frame};
pub use machine::{MachineReport, MmReport, VcpuReport, VmaReport, machine};
pub use tree::{TreeReport, tree};

use std::fmt::{self, Display};

use abi::objects::vma_flags;
use abi::pte::{Pte, PteFlags};

use super::walk::{Translation, Walk};

/// The flags of an entry, spelled out: `P W U A D NX COW …`. `PS` only where it means a page size.
#[must_use]
pub fn pte_flags(entry: Pte, level: u8) -> String {
    let names = [
        (PteFlags::PRESENT, "P"),
        (PteFlags::WRITE, "W"),
        (PteFlags::USER, "U"),
        (PteFlags::WRITE_THROUGH, "PWT"),
        (PteFlags::CACHE_DISABLE, "PCD"),
        (PteFlags::ACCESSED, "A"),
        (PteFlags::DIRTY, "D"),
        (PteFlags::HUGE, if level == 1 { "PAT" } else { "PS" }),
        (PteFlags::GLOBAL, "G"),
        (PteFlags::NO_EXECUTE, "NX"),
        (PteFlags::COW, "COW"),
        (PteFlags::SPECIAL, "SPECIAL"),
    ];
    let set = names
        .iter()
        .filter(|(flag, _)| entry.flags().contains(*flag))
        .map(|(_, name)| *name);
    let set: Vec<_> = set.collect();
    if set.is_empty() {
        "-".into()
    } else {
        set.join(" ")
    }
}

/// The flags of a VMA, spelled out.
#[must_use]
pub fn vma_flag_names(flags: u64) -> Vec<String> {
    let names = [
        (vma_flags::READ, "READ"),
        (vma_flags::WRITE, "WRITE"),
        (vma_flags::EXEC, "EXEC"),
        (vma_flags::SHARED, "SHARED"),
        (vma_flags::GROWSDOWN, "GROWSDOWN"),
        (vma_flags::LOCKED, "LOCKED"),
        (vma_flags::LOCKONFAULT, "LOCKONFAULT"),
        (vma_flags::DONTCOPY, "DONTCOPY"),
        (vma_flags::WIPEONFORK, "WIPEONFORK"),
        (vma_flags::DONTDUMP, "DONTDUMP"),
        (vma_flags::HUGEPAGE, "HUGEPAGE"),
        (vma_flags::MERGEABLE, "MERGEABLE"),
        (vma_flags::SEQ_READ, "SEQ_READ"),
        (vma_flags::RAND_READ, "RAND_READ"),
        (vma_flags::ACCOUNT, "ACCOUNT"),
        (vma_flags::NOHUGEPAGE, "NOHUGEPAGE"),
        (vma_flags::HEAP, "HEAP"),
        (vma_flags::NORESERVE, "NORESERVE"),
        (vma_flags::NOTIFY, "NOTIFY"),
    ];
    let known: u64 = names.iter().map(|(flag, _)| flag).sum();
    let set = names.iter().filter(|(flag, _)| flags & flag != 0);
    let rest = (flags & !known != 0).then(|| format!("{:#x}", flags & !known));
    set.map(|(_, name)| (*name).to_string())
        .chain(rest)
        .collect()
}

/// The CPUs of a mask: `{0, 2-3}`.
#[must_use]
pub fn cpu_set(mask: u64) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for cpu in (0..64).filter(|cpu| mask >> cpu & 1 == 1) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let runs: Vec<_> = runs
        .iter()
        .map(|(first, last)| match last - first {
            0 => first.to_string(),
            _ => format!("{first}-{last}"),
        })
        .collect();
    format!("{{{}}}", runs.join(", "))
}

/// `1 page`, `2 pages`.
pub(crate) fn count(number: impl Into<u64>, noun: &str) -> String {
    let number = number.into();
    let ending = match noun {
        _ if number == 1 => "",
        noun if noun.ends_with('y') => "ies",
        _ => "s",
    };
    let stem = if ending == "ies" {
        &noun[..noun.len() - 1]
    } else {
        noun
    };
    format!("{number} {stem}{ending}")
}

/// Bytes as 4 KiB, 2 MiB and so on.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Rows in columns as wide as their widest cell; columns named in `right` are right-aligned.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [usize],
}

impl Table {
    pub(super) fn new(right: &'static [usize], heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(ToString::to_string).collect()],
            right,
        }
    }
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::from(" ");
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                line.push(' ');
                line.push_str(&if self.right.contains(&column) {
                    format!("{cell:>width$} ")
                } else {
                    format!("{cell:<width$} ")
                });
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A translation, one line a level.
impl Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "GVA {:#x} under CR3 {:#x}", self.gva, self.cr3)?;
        for step in &self.steps {
            let entry = step.entry;
            writeln!(
                f,
                "  L{}[{:>3}]  at {:#011x}  {:#018x}  {}",
                step.level,
                step.index,
                step.table + 8 * u64::from(step.index),
                entry.0,
                pte_flags(entry, step.level)
            )?;
        }
        write!(f, "  ")?;
        match self.result {
            Translation::Mapped { gpa, level, rights } => {
                let may = [
                    (true, "read"),
                    (rights.write, "write"),
                    (rights.execute, "execute"),
                ];
                let may = may.iter().filter(|(set, _)| *set).map(|(_, name)| *name);
                let may: Vec<_> = may.collect();
                let who = if rights.user { "CPL 3" } else { "CPL 0" };
                let size = bytes(abi::pte::level_size(level));
                write!(
                    f,
                    "= GPA {gpa:#x} ({size} page; {who} may {})",
                    may.join(", ")
                )
            }
            Translation::NotPresent { level } => write!(f, "= not present at level {level}"),
            Translation::Reserved { level } => write!(f, "= reserved bit set at level {level}"),
            Translation::TableOutside { level, gpa } => {
                write!(
                    f,
                    "= the level-{level} table would be at {gpa:#x}, outside memory"
                )
            }
            Translation::NotCanonical => write!(f, "= not canonical"),
        }
    }
}

#[cfg(test)]
mod tests;
