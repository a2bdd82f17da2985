//! Page tables of a range, drawn as a tree: one line an entry, runs of like leaves folded.

use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::ENTRIES_PER_TABLE;
use abi::pte::{NonPresent, Pte, level_size};
use serde::Serialize;

use super::{bytes, pte_flags};
use crate::inspect::serde_hex;
use crate::inspect::walk::has_reserved_bits;
use crate::memory::PhysMem;

/// Most lines that a tree has; a range that needs more says so at its end.
const MAX_LINES: usize = 20_000;

/// The entries that translate a range.
#[derive(Clone, Debug, Serialize)]
pub struct TreeReport {
    /// The paging root.
    #[serde(with = "serde_hex")]
    pub cr3: u64,
    /// First address.
    #[serde(with = "serde_hex")]
    pub first: u64,
    /// Last address.
    #[serde(with = "serde_hex")]
    pub last: u64,
    /// The entries of the root.
    pub entries: Vec<Node>,
    /// True where the range had more entries than are kept.
    pub truncated: bool,
}

/// A run of entries, of length 1 unless they are leaves alike.
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// First address that the first entry translates.
    #[serde(with = "serde_hex")]
    pub gva: u64,
    /// Level of the table that holds it.
    pub level: u8,
    /// Index in that table.
    pub index: u16,
    /// The first entry.
    #[serde(serialize_with = "serde_hex::pte")]
    pub entry: Pte,
    /// Flags, spelled out.
    pub flags: String,
    /// Entries in the run.
    pub times: u64,
    /// Bytes from the frame of one entry to that of the next.
    pub stride: i64,
    /// What is wrong with it, if anything is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<&'static str>,
    /// The entries of the table that it refers to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entries: Vec<Node>,
}

/// Reads the entries of `cr3` that translate `range`.
pub fn tree<M: PhysMem + ?Sized>(mem: &M, cr3: u64, range: RangeInclusive<u64>) -> TreeReport {
    let mut drawing = Drawing {
        mem,
        first: *range.start(),
        last: *range.end(),
        path: Vec::new(),
        left: MAX_LINES,
    };
    let cr3 = Pte(cr3).address();
    let entries = drawing.table(cr3, 4, 0).unwrap_or_default();
    TreeReport {
        cr3,
        first: drawing.first,
        last: drawing.last,
        entries,
        truncated: drawing.left == 0,
    }
}

struct Drawing<'a, M: ?Sized> {
    mem: &'a M,
    first: u64,
    last: u64,
    /// Tables from the root down to here: a reference back to one of them is not followed.
    path: Vec<u64>,
    left: usize,
}

impl<M: PhysMem + ?Sized> Drawing<'_, M> {
    /// The entries of the table at `gpa` that translate from `base` on; what is wrong with it where
    /// there are none.
    fn table(&mut self, gpa: u64, level: u8, base: u64) -> Result<Vec<Node>, &'static str> {
        if self.path.contains(&gpa) {
            return Err("back to a table above");
        }
        let mem = self.mem;
        let entries = mem.table(gpa).map_err(|_| "outside guest memory")?;
        self.path.push(gpa);
        let mut nodes: Vec<Node> = Vec::new();
        for (slot, entry) in entries.iter().enumerate() {
            let entry = Pte(entry.load(Relaxed));
            let gva = extend(base + slot as u64 * level_size(level));
            let end = gva | (level_size(level) - 1);
            if entry.is_none() || end < self.first || gva > self.last {
                continue;
            }
            if nodes.last_mut().is_some_and(|run| run.absorb(gva, entry)) {
                continue;
            }
            let Some(left) = self.left.checked_sub(1) else {
                break;
            };
            self.left = left;
            nodes.push(self.node(gva, level, slot as u16, entry));
        }
        debug_assert!(nodes.len() <= ENTRIES_PER_TABLE);
        self.path.pop();
        Ok(nodes)
    }

    fn node(&mut self, gva: u64, level: u8, index: u16, entry: Pte) -> Node {
        let mut node = Node {
            gva,
            level,
            index,
            entry,
            flags: pte_flags(entry, level),
            times: 1,
            stride: 0,
            problem: None,
            entries: Vec::new(),
        };
        if !entry.is_present() {
            match entry.non_present().filter(|_| level == 1) {
                Some(NonPresent::Swap { .. }) => node.flags = "SWAP".into(),
                Some(NonPresent::Migration { .. }) => node.flags.push_str(" MIGRATION"),
                None => node.problem = Some("not present, yet not zero"),
            }
        } else if has_reserved_bits(entry, level) {
            node.problem = Some("reserved bit set");
        } else if !entry.is_leaf(level) {
            match self.table(entry.address(), level - 1, gva & 0xffff_ffff_ffff) {
                Ok(entries) => node.entries = entries,
                Err(problem) => node.problem = Some(problem),
            }
        }
        node
    }
}

fn extend(linear: u64) -> u64 {
    ((linear << 16).cast_signed() >> 16).cast_unsigned()
}

impl Node {
    fn is_leaf(&self) -> bool {
        self.problem.is_none() && self.entry.is_leaf(self.level)
    }

    /// Takes the entry for `gva` in, if it continues the run: the same flags, and frames at the same
    /// distance.
    fn absorb(&mut self, gva: u64, entry: Pte) -> bool {
        let size = level_size(self.level);
        let adjacent = gva == self.gva.wrapping_add(self.times * size);
        let alike = self.entry.0 & !abi::pte::ADDRESS_MASK == entry.0 & !abi::pte::ADDRESS_MASK;
        if !self.is_leaf() || !adjacent || !alike || !entry.is_present() {
            return false;
        }
        let distance = entry
            .address()
            .wrapping_sub(self.entry.address())
            .cast_signed();
        if self.times == 1 {
            let step = size.cast_signed();
            if distance != step && distance != -step && distance != 0 {
                return false;
            }
            self.stride = distance;
        } else if distance != self.stride.wrapping_mul(self.times.cast_signed()) {
            return false;
        }
        self.times += 1;
        true
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>, indent: &str, is_last: bool) -> fmt::Result {
        let branch = if is_last { "└─" } else { "├─" };
        let lead = format!("{indent}{branch} L{}[{:>3}]", self.level, self.index);
        let target = if self.is_leaf() {
            self.frames()
        } else {
            format!("table {:#x}", self.entry.address())
        };
        let gva = short(self.gva);
        write!(f, "{lead:<19} {gva:>16}  → {target:<23}  {}", self.flags)?;
        if self.times > 1 {
            write!(f, "  … ×{}", self.times)?;
        }
        if let Some(problem) = self.problem {
            write!(f, "  ✗ {problem}")?;
        }
        writeln!(f)?;
        let indent = format!("{indent}{}", if is_last { "   " } else { "│  " });
        draw_all(&self.entries, f, &indent)
    }

    /// The frames of a run.
    fn frames(&self) -> String {
        let first = self.entry.leaf_address(self.level);
        match self.times {
            1 if self.level > 1 => format!("{first:#x} ({})", bytes(level_size(self.level))),
            1 => format!("{first:#x}"),
            times => {
                let offset = self.stride.wrapping_mul(times.cast_signed() - 1);
                format!("{first:#x} … {:#x}", first.wrapping_add_signed(offset))
            }
        }
    }
}

fn draw_all(nodes: &[Node], f: &mut fmt::Formatter<'_>, indent: &str) -> fmt::Result {
    for (i, node) in nodes.iter().enumerate() {
        node.draw(f, indent, i + 1 == nodes.len())?;
    }
    Ok(())
}

/// An address with at least as many digits as tell it apart.
fn short(gva: u64) -> String {
    format!("{gva:012x}")
}

impl Display for TreeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "level-4 table {:#x}, GVA {} to {}",
            self.cr3,
            short(self.first),
            short(self.last)
        )?;
        if self.entries.is_empty() {
            writeln!(f, "└─ nothing is mapped here")?;
        }
        draw_all(&self.entries, f, "")?;
        if self.truncated {
            writeln!(
                f,
                "   … more than {MAX_LINES} lines: ask for a smaller range"
            )?;
        }
        Ok(())
    }
}
