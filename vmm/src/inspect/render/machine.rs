//! vCPUs, mms and their VMAs.

use std::fmt::{self, Display};

use abi::pte::Pte;
use serde::Serialize;

use super::{Table, count, cpu_set, vma_flag_names};
use crate::inspect::objects::{MmView, TaskView, VmaView};
use crate::inspect::walk::for_each_leaf;
use crate::inspect::{Snapshot, Stop, VcpuFacts};
use crate::memory::PhysMem;

/// The whole machine at a glance.
#[derive(Clone, Debug, Serialize)]
pub struct MachineReport {
    /// vCPUs.
    pub vcpus: Vec<VcpuReport>,
    /// Address spaces.
    pub mms: Vec<MmReport>,
    /// Tasks.
    pub tasks: Vec<TaskView>,
    /// Frames in all, and free ones.
    pub frames: Frames,
}

/// How much memory there is.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Frames {
    pub total: u64,
    pub free: u64,
}

/// One vCPU: what the machine says, and what the kernel says.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuReport {
    /// What the machine says.
    #[serde(flatten)]
    pub facts: VcpuFacts,
    /// Number of the mm whose table is in CR3; none for the kernel's own.
    pub mm: Option<u64>,
    /// True where the kernel keeps it loaded without running a task of it.
    pub lazy: bool,
    /// Number of its task.
    pub task: Option<u32>,
    /// `tlb_gen` up to which it has flushed.
    pub tlb_gen: u64,
    /// CPUs whose acknowledgement of a shootdown it awaits.
    pub waits_for_cpus: u64,
    /// Function and line at RIP, where [`MachineReport::name_addresses`] knows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
}

/// One address space.
#[derive(Clone, Debug, Serialize)]
pub struct MmReport {
    /// What the kernel says.
    #[serde(flatten)]
    pub mm: MmView,
    /// The VMAs, with what the page tables say.
    #[serde(rename = "maps")]
    pub vmas: Vec<VmaReport>,
}

/// One VMA for a person.
#[derive(Clone, Debug, Serialize)]
pub struct VmaReport {
    /// `START-END rwxp`, as in /proc/PID/maps.
    pub range: String,
    /// Flags, spelled out.
    pub flags: Vec<String>,
    /// Page offset of the start.
    pub pgoff: u64,
    /// Pages that it spans.
    pub pages: u64,
    /// Pages that are present.
    pub resident: u64,
    /// GPA of its anon_vma, 0 for none.
    pub anon_vma: u64,
}

/// Reports on all vCPUs and mms.
pub fn machine<M: PhysMem + ?Sized>(
    mem: &M,
    snapshot: &Snapshot,
    vcpus: &[VcpuFacts],
) -> MachineReport {
    MachineReport {
        vcpus: vcpus.iter().map(|facts| vcpu(snapshot, facts)).collect(),
        mms: snapshot
            .mms
            .iter()
            .map(|mm| MmReport {
                mm: mm.clone(),
                vmas: mm.vmas.iter().map(|vma| maps_line(mem, mm, vma)).collect(),
            })
            .collect(),
        tasks: snapshot.tasks.clone(),
        frames: Frames {
            total: snapshot.root.nr_frames,
            free: snapshot.root.free_frames,
        },
    }
}

fn vcpu(snapshot: &Snapshot, facts: &VcpuFacts) -> VcpuReport {
    let pgd = Pte(facts.cr3).address();
    let cpu = snapshot.cpus.get(facts.index);
    let task = cpu.and_then(|cpu| snapshot.task_at(cpu.current));
    VcpuReport {
        facts: *facts,
        mm: snapshot.mms.iter().find(|mm| mm.pgd == pgd).map(|mm| mm.id),
        lazy: cpu.is_some_and(|cpu| cpu.lazy),
        task: task.map(|task| task.id),
        tlb_gen: cpu.map_or(0, |cpu| cpu.tlb_gen),
        waits_for_cpus: cpu
            .and_then(|cpu| cpu.flush)
            .map_or(0, |flush| flush.pending),
        function: None,
    }
}

fn maps_line<M: PhysMem + ?Sized>(mem: &M, mm: &MmView, vma: &VmaView) -> VmaReport {
    let mut resident = 0;
    if vma.start < vma.end {
        for_each_leaf(mem, mm.pgd, vma.start..=vma.end - 1, |leaf| {
            resident += leaf.bytes() / abi::layout::PAGE_SIZE;
        });
    }
    VmaReport {
        range: vma.label(),
        flags: vma_flag_names(vma.flags),
        pgoff: vma.pgoff,
        pages: vma.end.saturating_sub(vma.start) / abi::layout::PAGE_SIZE,
        resident,
        anon_vma: vma.anon_vma,
    }
}

impl Display for MachineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vCPUs")?;
        let heading = [
            "vCPU", "CPL", "RIP", "CR3", "mm", "task", "TLB gen", "state",
        ];
        let mut table = Table::new(&[0, 1, 5, 6], &heading);
        for vcpu in &self.vcpus {
            table.row(vcpu.cells());
        }
        writeln!(f, "{table}")?;
        let named = || self.vcpus.iter().filter(|vcpu| vcpu.function.is_some());
        for vcpu in named() {
            let function = vcpu.function.as_deref().unwrap_or_default();
            writeln!(f, "  vCPU {:>2} is in {function}", vcpu.facts.index)?;
        }
        if named().next().is_some() {
            writeln!(f)?;
        }
        writeln!(
            f,
            "Memory   {}, {} free",
            count(self.frames.total, "frame"),
            self.frames.free
        )?;
        for mm in &self.mms {
            write!(f, "\n{mm}")?;
        }
        self.fmt_tasks(f)
    }
}

impl MachineReport {
    /// Says of each vCPU in which function it stands, as `resolve` knows its RIP.
    pub fn name_addresses(&mut self, resolve: impl Fn(u64) -> Option<String>) {
        for vcpu in &mut self.vcpus {
            vcpu.function = resolve(vcpu.facts.rip);
        }
    }

    fn fmt_tasks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nTasks")?;
        let heading = [
            "task",
            "process",
            "parent",
            "mm",
            "CPU",
            "may run on",
            "state",
        ];
        let mut table = Table::new(&[0, 1, 2, 4], &heading);
        for task in &self.tasks {
            let mm = self.mms.iter().find(|mm| mm.mm.gpa == task.mm);
            let waits = task.sleeps_for().map(|what| format!(", {what}"));
            table.row([
                task.id.to_string(),
                task.process.to_string(),
                task.parent.to_string(),
                mm.map_or("-".into(), |mm| format!("mm {}", mm.mm.id)),
                task.cpu.to_string(),
                affinity(task.affinity),
                task.state_name() + &waits.unwrap_or_default(),
            ]);
        }
        write!(f, "{table}")
    }
}

fn affinity(mask: u64) -> String {
    if mask == u64::MAX {
        "any".into()
    } else {
        cpu_set(mask)
    }
}

impl VcpuReport {
    fn cells(&self) -> [String; 8] {
        let facts = &self.facts;
        let mm = match self.mm {
            None => "kernel".into(),
            Some(id) if self.lazy => format!("mm {id} (lazy)"),
            Some(id) => format!("mm {id}"),
        };
        [
            facts.index.to_string(),
            facts.cpl.to_string(),
            format!("{:#018x}", facts.rip),
            format!("{:#x}", facts.cr3),
            mm,
            self.task.map_or("-".into(), |task| task.to_string()),
            self.tlb_gen.to_string(),
            self.state(),
        ]
    }

    fn state(&self) -> String {
        let waits = match self.waits_for_cpus {
            0 => String::new(),
            cpus => format!(", awaits CPUs {}", cpu_set(cpus)),
        };
        match self.facts.stop {
            Stop::Anywhere if self.facts.cpl == 3 => "in the program".into(),
            Stop::Anywhere => format!("in the kernel{waits}"),
            Stop::Point(point) => format!("at {}{waits}", point.name()),
            Stop::Halted => "idle (halted)".into(),
            Stop::Exited => "has ended the run".into(),
        }
    }
}

impl Display for MmReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mm = &self.mm;
        let lock = if mm.is_write_locked() {
            "held for writing".into()
        } else if mm.readers() != 0 {
            format!("held by {}", count(mm.readers(), "reader"))
        } else {
            "free".to_string()
        };
        writeln!(
            f,
            "mm {}   level-4 table {:#x}, TLB gen {}, cpumask {}, mmap_lock {lock}",
            mm.id,
            mm.pgd,
            mm.tlb_gen,
            cpu_set(mm.cpumask),
        )?;
        writeln!(
            f,
            "       {}, count {}; {}, {} resident, {}",
            count(mm.users, "user"),
            mm.count,
            count(mm.map_count, "VMA"),
            count(mm.rss, "page"),
            count(mm.tables, "table"),
        )?;
        if self.vmas.is_empty() {
            return Ok(());
        }
        let mut table = Table::new(
            &[1, 2, 3],
            &["range", "resident", "pages", "pgoff", "anon_vma", "flags"],
        );
        for vma in &self.vmas {
            table.row([
                vma.range.clone(),
                vma.resident.to_string(),
                vma.pages.to_string(),
                format!("{:#x}", vma.pgoff),
                match vma.anon_vma {
                    0 => "-".into(),
                    gpa => format!("{gpa:#x}"),
                },
                vma.flags.join(" "),
            ]);
        }
        write!(f, "{table}")
    }
}
