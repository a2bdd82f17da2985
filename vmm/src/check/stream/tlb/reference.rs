//! A tiny MMU that does everything the architecture permits.
//!
//! Caching one translation never forbids another, so all legal contents of a TLB are the subsets of one: what was
//! ever there to be cached, less what an invalidation has certainly dropped. The MMU keeps exactly that set, with
//! brute force: after every step it walks from CR3 and from every pointer that it holds, in real tables.
//! Nothing of the model is used but entries and how a step is named.

use std::collections::{BTreeMap, BTreeSet};

use abi::pte::{Pte, PteFlags, level_size};

use super::history::{Step, To};

/// Level-4 tables of the two mms.
pub(super) const ROOTS: [u64; 2] = [0x1000, 0x2000];
/// Tables of level 3, 2 and 1.
pub(super) const POOLS: [[u64; 2]; 3] = [[0x3000, 0x4000], [0x5000, 0x6000], [0x7000, 0x8000]];
pub(super) const VCPUS: usize = 2;
/// Level-4 table of the kernel's own, in which nothing is.
pub(super) const KERNEL: u64 = 0xf000;

/// A page of the few that histories are about: two entries of each level are used.
pub(super) fn page(number: u64) -> u64 {
    let bit = |n: u64| number >> n & 1;
    bit(2) * level_size(3) + bit(1) * level_size(2) + bit(0) * level_size(1)
}

fn flags(bits: u8) -> PteFlags {
    let all = [
        PteFlags::WRITE,
        PteFlags::USER,
        PteFlags::NO_EXECUTE,
        PteFlags::GLOBAL,
        PteFlags::ACCESSED,
        PteFlags::DIRTY,
    ];
    let mut flags = PteFlags::PRESENT;
    for (n, flag) in all.into_iter().enumerate() {
        flags.set(flag, bits >> n & 1 != 0);
    }
    flags
}

/// What the model is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told {
    Change {
        mm: u64,
        gva: u64,
        level: u8,
        old: Pte,
        new: Pte,
    },
    Other,
}

/// The rights of a cached translation: R/W, U/S, fetches, D.
pub(super) type Allowed = (bool, bool, bool, bool);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cached {
    pcid: u64,
    level: u8,
    /// First address.
    gva: u64,
    /// Page or table.
    to: u64,
    allowed: Allowed,
    leaf: bool,
    global: bool,
}

impl Cached {
    fn covers(&self, gva: u64) -> bool {
        gva & !(level_size(self.level) - 1) == self.gva
    }
}

/// One vCPU.
#[derive(Clone, Debug)]
struct Cpu {
    root: u64,
    pcid: u64,
    cached: BTreeSet<Cached>,
}

/// Memory and the vCPUs.
#[derive(Clone, Debug)]
pub(super) struct Mmu {
    memory: BTreeMap<u64, u64>,
    cpus: Vec<Cpu>,
    /// For each slot and version of its entry what A and D were in the end, as a first run has found.
    ends: BTreeMap<(u64, u32), u64>,
    versions: BTreeMap<u64, u32>,
}

impl Mmu {
    /// What the processor sets by itself it may set at any moment: what it has set is only known when the entry is
    /// next written. So a first run finds what every entry had in the end, and a second one caches accordingly.
    pub(super) fn after(steps: &[Step]) -> Self {
        let mut first = Self::new(BTreeMap::new());
        let mut ends = BTreeMap::new();
        for step in steps {
            let (slot, before) = first.target(step).unwrap_or((0, 0));
            let version = first.versions.get(&slot).copied().unwrap_or(0);
            if let (Step::Write { .. }, Told::Change { .. }) = (step, first.step(step)) {
                ends.insert((slot, version), before);
            }
        }
        let mut second = Self::new(ends);
        for step in steps {
            second.step(step);
            second.fill();
        }
        second
    }

    pub(super) fn new(ends: BTreeMap<(u64, u32), u64>) -> Self {
        let cpu = Cpu {
            root: KERNEL,
            pcid: 0,
            cached: BTreeSet::new(),
        };
        Self {
            memory: BTreeMap::new(),
            cpus: vec![cpu; VCPUS],
            ends,
            versions: BTreeMap::new(),
        }
    }

    fn read(&self, slot: u64) -> Pte {
        Pte(self.memory.get(&slot).copied().unwrap_or(0))
    }

    /// The slot of an entry and what is there.
    fn slot(&self, mm: usize, level: u8, gva: u64) -> Option<u64> {
        let mut table = ROOTS[mm];
        for above in (level + 1..=4).rev() {
            let entry = self.read(at(table, above, gva));
            if !entry.is_present() || entry.is_leaf(above) {
                return None;
            }
            table = entry.address();
        }
        Some(at(table, level, gva))
    }

    fn target(&self, step: &Step) -> Option<(u64, u64)> {
        let Step::Write {
            mm,
            level,
            page: number,
            ..
        } = *step
        else {
            return None;
        };
        let slot = self.slot(mm, level, page(number))?;
        Some((slot, self.read(slot).0))
    }

    fn is_linked(&self, table: u64) -> bool {
        self.memory.iter().any(|(slot, entry)| {
            let level = level_of(*slot);
            Pte(*entry).is_present()
                && !Pte(*entry).is_leaf(level)
                && Pte(*entry).address() == table
        })
    }

    /// Takes a step; says what an instrumented kernel says.
    pub(super) fn step(&mut self, step: &Step) -> Told {
        match *step {
            Step::Write {
                mm,
                level,
                page: number,
                ref to,
            } => {
                let gva = page(number) & !(level_size(level) - 1);
                if let Some(slot) = self.slot(mm, level, gva)
                    && let Some(new) = self.value(level, self.read(slot), to)
                {
                    let old = self.read(slot);
                    self.memory.insert(slot, new.0);
                    *self.versions.entry(slot).or_default() += 1;
                    return Told::Change {
                        mm: mm as u64 + 1,
                        gva,
                        level,
                        old,
                        new,
                    };
                }
            }
            Step::Use {
                mm,
                page: number,
                store,
            } => self.set_bits(mm, page(number), store),
            Step::Load {
                vcpu,
                mm,
                pcid,
                keep,
            } => {
                let cpu = &mut self.cpus[vcpu];
                (cpu.root, cpu.pcid) = (root(mm), pcid);
                if !keep {
                    cpu.cached.retain(|it| it.global || it.pcid != pcid);
                }
            }
            Step::Invlpg { vcpu, page: number } => {
                let cpu = &mut self.cpus[vcpu];
                let pcid = cpu.pcid;
                cpu.cached.retain(|it| {
                    let is_current = it.global || it.pcid == pcid;
                    !is_current || it.leaf && !it.covers(page(number))
                });
            }
            Step::Invpcid {
                vcpu,
                pcid,
                page: number,
            } => {
                let cached = &mut self.cpus[vcpu].cached;
                cached.retain(|it| it.global || it.pcid != pcid || !it.covers(page(number)));
            }
            Step::Context { vcpu, pcid } => {
                self.cpus[vcpu]
                    .cached
                    .retain(|it| it.global || it.pcid != pcid);
            }
            Step::All { vcpu, global } => {
                self.cpus[vcpu].cached.retain(|it| it.global && !global);
            }
            Step::Fault { vcpu, page: number } => {
                let cpu = &mut self.cpus[vcpu];
                let pcid = cpu.pcid;
                cpu.cached.retain(|it| {
                    let is_current = it.global || it.pcid == pcid;
                    !is_current || !it.covers(page(number))
                });
            }
        }
        Told::Other
    }

    fn value(&self, level: u8, old: Pte, to: &To) -> Option<Pte> {
        let table = |bits: u8| flags(bits & 7) | PteFlags::ACCESSED;
        Some(match *to {
            To::None => Pte::NONE,
            To::Leaf(number, bits) => {
                let huge = match level {
                    1 => PteFlags::empty(),
                    2 | 3 => PteFlags::HUGE,
                    _ => return None,
                };
                Pte::new((number + 1) * level_size(level), flags(bits) | huge)
            }
            To::Table(number, bits) => {
                let pool = POOLS.get(4usize.checked_sub(level.into())?)?;
                let new = pool[number];
                if self.is_linked(new) {
                    return None;
                }
                Pte::new(new, table(bits))
            }
            To::Same(_) if !old.is_present() => return None,
            To::Same(bits) if old.is_leaf(level) => {
                let huge = old.flags() & PteFlags::HUGE;
                Pte::new(old.address(), flags(bits) | huge)
            }
            To::Same(bits) => Pte::new(old.address(), table(bits)),
        })
    }

    fn set_bits(&mut self, mm: usize, gva: u64, store: bool) {
        for level in (1..=4).rev() {
            let Some(slot) = self.slot(mm, level, gva) else {
                return;
            };
            let entry = self.read(slot);
            if !entry.is_present() {
                return;
            }
            let mut bits = PteFlags::ACCESSED;
            let is_leaf = entry.is_leaf(level);
            if store && is_leaf && entry.flags().contains(PteFlags::WRITE) {
                bits |= PteFlags::DIRTY;
            }
            self.memory.insert(slot, entry.with(bits).0);
            if is_leaf {
                return;
            }
        }
    }

    /// Caches everything that can be.
    fn fill(&mut self) {
        for cpu in 0..self.cpus.len() {
            let (root, pcid) = (self.cpus[cpu].root, self.cpus[cpu].pcid);
            loop {
                let mut more = BTreeSet::new();
                let free = (true, true, true, true);
                self.fill_from(pcid, (root, 4, 0), free, &mut more);
                for it in &self.cpus[cpu].cached {
                    if !it.leaf && it.pcid == pcid {
                        self.fill_from(pcid, (it.to, it.level - 1, it.gva), it.allowed, &mut more);
                    }
                }
                let before = self.cpus[cpu].cached.len();
                self.cpus[cpu].cached.append(&mut more);
                if self.cpus[cpu].cached.len() == before {
                    break;
                }
            }
        }
    }

    fn fill_from(
        &self,
        pcid: u64,
        (table, level, base): (u64, u8, u64),
        above: Allowed,
        to: &mut BTreeSet<Cached>,
    ) {
        for index in 0..2 {
            let slot = table + index * 8;
            let version = self.versions.get(&slot).copied().unwrap_or(0);
            let entry = self.read(slot);
            if !entry.is_present() {
                continue;
            }
            // Of the last version nobody has seen the end.
            let hardware = PteFlags::ACCESSED | PteFlags::DIRTY;
            let end = self.ends.get(&(slot, version));
            let end = end.map_or(hardware, |end| Pte(*end).flags());
            if !end.contains(PteFlags::ACCESSED) {
                continue;
            }
            let (flags, leaf) = (entry.flags(), entry.is_leaf(level));
            let write = above.0 && flags.contains(PteFlags::WRITE);
            let dirty = above.3 && (!leaf || end.contains(PteFlags::DIRTY));
            to.insert(Cached {
                pcid,
                level,
                gva: base + index * level_size(level),
                to: if leaf {
                    entry.leaf_address(level)
                } else {
                    entry.address()
                },
                allowed: (
                    write,
                    above.1 && flags.contains(PteFlags::USER),
                    above.2 && !flags.contains(PteFlags::NO_EXECUTE),
                    if leaf { dirty && write } else { dirty },
                ),
                leaf,
                global: leaf && flags.contains(PteFlags::GLOBAL),
            });
        }
    }

    /// Every way in which a vCPU may translate a page now: frame and rights.
    pub(super) fn translations(&self, vcpu: usize, gva: u64) -> BTreeSet<(u64, Allowed)> {
        let cpu = &self.cpus[vcpu];
        let usable = |it: &&Cached| it.leaf && (it.global || it.pcid == cpu.pcid) && it.covers(gva);
        let all = cpu.cached.iter().filter(usable);
        all.map(|it| (it.to + (gva - it.gva), it.allowed)).collect()
    }

    /// The tables to which a vCPU may hold a pointer in the PCID that is loaded.
    pub(super) fn tables(&self, vcpu: usize) -> BTreeSet<u64> {
        let cpu = &self.cpus[vcpu];
        let usable = |it: &&Cached| !it.leaf && it.pcid == cpu.pcid;
        cpu.cached.iter().filter(usable).map(|it| it.to).collect()
    }
}

/// Of an mm, or (2) the kernel's own.
pub(super) fn root(mm: usize) -> u64 {
    ROOTS.get(mm).copied().unwrap_or(KERNEL)
}

fn at(table: u64, level: u8, gva: u64) -> u64 {
    table + abi::pte::index(gva, level) as u64 * 8
}

fn level_of(slot: u64) -> u8 {
    let table = slot & !0xfff;
    let pool = POOLS.iter().position(|pool| pool.contains(&table));
    pool.map_or(4, |at| 3 - at as u8)
}
