//! One frame: what it is, who maps it, and who could by its rmap.

use std::fmt::{self, Display};

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameKind, SlabId};
use abi::pte::Pte;
use serde::Serialize;

use super::pte_flags;
use crate::inspect::walk::{KERNEL_HALF, Leaf, Translation, USER_HALF, for_each_leaf, translate};
use crate::inspect::{AnonVmaView, FolioView, Snapshot, Walk, serde_hex};
use crate::memory::PhysMem;

/// One frame.
#[derive(Clone, Debug, Serialize)]
pub struct FrameReport {
    /// Its number.
    pub frame: u64,
    /// Its descriptor, where it has one.
    pub folio: Option<FolioView>,
    /// Its kind for a person.
    pub kind: String,
    /// Whose it is, for a person.
    pub owner: String,
    /// Entries that map it: every mm's, then the kernel's.
    pub mappings: Vec<MappingReport>,
    /// Its anon_vma, where it is an anonymous folio's.
    pub anon_vma: Option<AnonVmaView>,
    /// The VMAs that its anon_vma leads to.
    pub rmap: Vec<RmapReport>,
}

/// One entry that maps the frame.
#[derive(Clone, Debug, Serialize)]
pub struct MappingReport {
    /// Number of the mm; none for the kernel's tables.
    pub mm: Option<u64>,
    /// Address of the frame there.
    #[serde(with = "serde_hex")]
    pub gva: u64,
    /// Level of the entry.
    pub level: u8,
    /// Where the entry lies.
    #[serde(with = "serde_hex")]
    pub entry_gpa: u64,
    /// The entry.
    #[serde(serialize_with = "serde_hex::pte")]
    pub entry: Pte,
    /// Its flags, spelled out.
    pub flags: String,
    /// The VMA around it.
    pub vma: Option<String>,
}

/// One VMA that the rmap leads to.
#[derive(Clone, Debug, Serialize)]
pub struct RmapReport {
    /// Number of its mm, where the VMA is in one's tree.
    pub mm: Option<u64>,
    /// The VMA, for a person.
    pub vma: String,
    /// Where the folio's index puts the frame in it.
    pub gva: Option<u64>,
    /// True where the entry there maps the frame.
    pub mapped: bool,
}

/// Reports on the frame at `gpa`.
pub fn frame<M: PhysMem + ?Sized>(mem: &M, snapshot: &Snapshot, gpa: u64) -> FrameReport {
    let folio = snapshot.folio(gpa).copied();
    let anon = folio.filter(|folio| folio.is(FrameKind::Anon));
    let file = folio
        .filter(|folio| folio.is(FrameKind::File))
        .and_then(|folio| snapshot.files.get(&folio.owner));
    let anon_vma = anon.and_then(|folio| snapshot.anon_vmas.get(&folio.owner));
    FrameReport {
        frame: gpa >> PAGE_SHIFT,
        folio,
        kind: folio.map_or("outside memory".into(), |folio| folio.kind_name()),
        owner: folio.map_or(String::new(), |folio| owner(snapshot, &folio)),
        mappings: mappings(mem, snapshot, gpa),
        anon_vma: anon_vma.cloned(),
        rmap: match (folio, anon_vma, file) {
            (Some(folio), Some(anon_vma), _) => {
                let vmas = anon_vma.chains.iter().map(|chain| chain.vma);
                rmap(mem, snapshot, &folio, vmas)
            }
            (Some(folio), None, Some(file)) => {
                let vmas = file.i_mmap.iter().map(|mapping| mapping.vma);
                rmap(mem, snapshot, &folio, vmas)
            }
            _ => Vec::new(),
        },
    }
}

/// Translates `gva` in the mm with number `mm`, and reports on the frame behind it.
///
/// `None` where there is no such mm.
pub fn folio_behind<M: PhysMem + ?Sized>(
    mem: &M,
    snapshot: &Snapshot,
    mm: u64,
    gva: u64,
) -> Option<(Walk, Option<FrameReport>)> {
    let walk = translate(mem, snapshot.mm(mm)?.pgd, gva);
    let report = match walk.result {
        Translation::Mapped { gpa, .. } => Some(frame(mem, snapshot, gpa)),
        _ => None,
    };
    Some((walk, report))
}

fn owner(snapshot: &Snapshot, folio: &FolioView) -> String {
    match folio.kind() {
        Some(FrameKind::Table | FrameKind::Retired) => {
            format!("{}, level {}", snapshot.mm_name(folio.owner), folio.index)
        }
        Some(FrameKind::PerCpu) => format!("free list of CPU {}", folio.owner),
        Some(FrameKind::Anon) => format!("anon_vma {:#x}, index {:#x}", folio.owner, folio.index),
        Some(FrameKind::File) => format!("file {:#x}, page {:#x}", folio.owner, folio.index),
        Some(FrameKind::Slab) => {
            let slabs = [
                SlabId::Mm,
                SlabId::Vma,
                SlabId::VmaNode,
                SlabId::AnonVma,
                SlabId::AnonVmaChain,
                SlabId::Task,
                SlabId::File,
                SlabId::CacheNode,
                SlabId::OpenFile,
                SlabId::FileTable,
            ];
            let slab = slabs.iter().find(|slab| **slab as u64 == folio.owner);
            slab.map_or(format!("slab {}", folio.owner), |slab| {
                format!("{slab:?} slab")
            })
        }
        _ => "-".into(),
    }
}

fn mappings<M: PhysMem + ?Sized>(mem: &M, snapshot: &Snapshot, gpa: u64) -> Vec<MappingReport> {
    let wanted = gpa & !(PAGE_SIZE - 1);
    let mut found = Vec::new();
    let mut collect = |cr3, range, mm: Option<u64>| {
        for_each_leaf(mem, cr3, range, |leaf| {
            if leaf.target() <= wanted && wanted - leaf.target() < leaf.bytes() {
                found.push(mapping(snapshot, mm, &leaf, wanted));
            }
        });
    };
    for mm in &snapshot.mms {
        collect(mm.pgd, USER_HALF, Some(mm.id));
    }
    collect(snapshot.root.pgd, KERNEL_HALF, None);
    found
}

fn mapping(snapshot: &Snapshot, mm: Option<u64>, leaf: &Leaf, wanted: u64) -> MappingReport {
    let gva = leaf.gva + (wanted - leaf.target());
    let vma = mm.and_then(|mm| snapshot.mm(mm)?.vma_at(gva));
    MappingReport {
        mm,
        gva,
        level: leaf.level,
        entry_gpa: leaf.entry_gpa(),
        entry: leaf.entry,
        flags: pte_flags(leaf.entry, leaf.level),
        vma: vma.map(crate::inspect::VmaView::label),
    }
}

fn rmap<M: PhysMem + ?Sized>(
    mem: &M,
    snapshot: &Snapshot,
    folio: &FolioView,
    vmas: impl Iterator<Item = u64>,
) -> Vec<RmapReport> {
    let report = |vma: u64| {
        let Some((mm, vma)) = snapshot.vma(vma) else {
            return RmapReport {
                mm: None,
                vma: format!("VMA at {vma:#x}, in no mm's tree"),
                gva: None,
                mapped: false,
            };
        };
        let gva = vma.address_of(folio.index);
        let gpa = gva.map(|gva| translate(mem, mm.pgd, gva).result);
        let mapped = matches!(gpa, Some(Translation::Mapped { gpa, .. })
            if gpa >> PAGE_SHIFT == folio.frame);
        RmapReport {
            mm: Some(mm.id),
            vma: vma.label(),
            gva,
            mapped,
        }
    };
    vmas.map(report).collect()
}

impl Display for FrameReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpa = self.frame << PAGE_SHIFT;
        writeln!(f, "frame {:#x}   GPA {gpa:#x}", self.frame)?;
        let Some(folio) = &self.folio else {
            return writeln!(f, "  no descriptor: {}", self.kind);
        };
        let exclusive = if folio.is_exclusive() {
            ", EXCLUSIVE"
        } else {
            ""
        };
        writeln!(
            f,
            "  folio      {}, order {}{exclusive}, allocated {}",
            self.kind,
            folio.order,
            super::count(folio.generation, "time")
        )?;
        writeln!(
            f,
            "  counts     refcount {}, mapcount {}{}",
            folio.refcount,
            folio.mapcount,
            match folio.pins {
                0 => String::new(),
                pins => format!(", pinned {}", super::count(pins, "time")),
            }
        )?;
        writeln!(f, "  owner      {}", self.owner)?;
        self.fmt_mappings(f)?;
        self.fmt_rmap(f)
    }
}

impl FrameReport {
    fn fmt_mappings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let users = self.mappings.iter().filter(|mapping| mapping.mm.is_some());
        writeln!(
            f,
            "  mapped by  {} of processes, {} in all",
            super::count(users.count() as u64, "entry"),
            self.mappings.len()
        )?;
        for mapping in &self.mappings {
            let who = mapping.mm.map_or("kernel".into(), |mm| format!("mm {mm}"));
            writeln!(
                f,
                "    {who:<7} {:012x}  L{} entry at {:#x}  {}{}",
                mapping.gva,
                mapping.level,
                mapping.entry_gpa,
                mapping.flags,
                mapping
                    .vma
                    .as_ref()
                    .map_or(String::new(), |vma| format!("  in {vma}"))
            )?;
        }
        Ok(())
    }

    fn fmt_rmap(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(anon_vma) = &self.anon_vma else {
            return Ok(());
        };
        writeln!(
            f,
            "  rmap       anon_vma {:#x} (root {:#x}, refcount {}, degree {}) leads to {}",
            anon_vma.gpa,
            anon_vma.root,
            anon_vma.refcount,
            anon_vma.degree,
            super::count(self.rmap.len() as u64, "VMA")
        )?;
        for vma in &self.rmap {
            let mm = vma.mm.map_or("-".into(), |mm| format!("mm {mm}"));
            let at = match (vma.gva, vma.mapped) {
                (None, _) => "does not reach it".into(),
                (Some(gva), true) => format!("maps it at {gva:#x}"),
                (Some(gva), false) => format!("does not map it at {gva:#x}"),
            };
            writeln!(f, "    {mm:<7} {}  {at}", vma.vma)?;
        }
        Ok(())
    }
}
