//! One vCPU: its PCIDs, what it has loaded, and what its instructions invalidate.

use abi::pte::level_size;

use super::caches::Context;
use super::held::{Change, Held, Notes, Rights, Written};
use super::laws::{Law, Laws};
use super::tables::Tables;

/// Most PCIDs that are followed.
const MAX_PCIDS: usize = 64;

/// An invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// INVLPG of every page from the first address to the second.
    Invlpg(u64, u64),
    /// A load of CR3 with the current PCID.
    Current,
    /// INVPCID type 0 of every page, in a PCID.
    Address(u64, u64, u64),
    /// INVPCID type 1.
    Pcid(u64),
    /// INVPCID type 2.
    AllAndGlobal,
    /// INVPCID type 3.
    All,
    /// A page fault at an address.
    Fault(u64),
}

/// One vCPU.
#[derive(Clone, Debug)]
pub(super) struct Vcpu {
    pub(super) lazy: bool,
    contexts: Vec<Context>,
    /// Which of them is loaded.
    loaded: usize,
    /// PCIDs that were not loaded since the start may have something cached.
    unknown: bool,
    /// Global translations that may be cached though the loaded tables do not say them.
    pub(super) globals: Notes,
    /// The last invalidation, and its event.
    pub(super) last_flush: Option<(Flush, u64)>,
}

impl Default for Vcpu {
    /// On the kernel's own tables, in PCID 0.
    fn default() -> Self {
        let context = Context {
            until: u64::MAX,
            ..Context::default()
        };
        Self {
            lazy: false,
            contexts: vec![context],
            loaded: 0,
            unknown: false,
            globals: Notes::default(),
            last_flush: None,
        }
    }
}

impl Vcpu {
    /// Has `root` of `mm` loaded from the start, with this PCID.
    pub(super) fn place(&mut self, mm: u64, root: u64, pcid: u64) {
        let context = &mut self.contexts[self.loaded];
        (context.mm, context.root, context.pcid) = (mm, root, pcid);
    }

    /// Nobody knows what it has cached at the start.
    pub(super) fn forget_past(&mut self) {
        self.unknown = true;
        self.contexts[self.loaded].unknown = true;
    }

    /// True where something that no event told of may translate `gva`.
    pub(super) fn is_unknown(&self, gva: u64) -> bool {
        let context = self.loaded();
        let is_settled = |range: &(u64, u64)| (range.0..range.1).contains(&gva);
        context.unknown && !context.settled.iter().any(is_settled)
    }

    /// The PCID that is loaded.
    pub(super) fn loaded(&self) -> &Context {
        &self.contexts[self.loaded]
    }

    /// True where user code may run: what is held can be used.
    pub(super) fn runs_user(&self) -> bool {
        !self.lazy && self.loaded().mm != 0
    }

    /// Everything that is written down: with whether the vCPU can use it where it runs user code.
    pub(super) fn leaves_mut(&mut self) -> impl Iterator<Item = (bool, &mut Held)> {
        let runs = self.runs_user();
        let loaded = self.loaded;
        let contexts = self.contexts.iter_mut().enumerate();
        contexts
            .flat_map(move |(index, context)| {
                let usable = runs && index == loaded;
                context.leaves.iter_mut().map(move |held| (usable, held))
            })
            .chain(self.globals.iter_mut().map(move |held| (runs, held)))
    }

    /// Every pointer that is written down, with whether it may be walked now.
    pub(super) fn pointers_mut(&mut self) -> impl Iterator<Item = (bool, &mut Held)> {
        let loaded = self.loaded;
        let contexts = self.contexts.iter_mut().enumerate();
        contexts.flat_map(move |(index, context)| {
            let usable = index == loaded;
            context.pointers.iter_mut().map(move |held| (usable, held))
        })
    }

    /// An entry changes. `tables`: before it has.
    pub(super) fn written(&mut self, it: &Written, tables: &Tables, laws: Laws) {
        self.globals.resolve(it, laws);
        for context in &mut self.contexts {
            context.written(it, &mut self.globals, tables, laws);
        }
    }

    /// The table at `table` is freed: what lies in it is gone. `tables`: before it is.
    pub(super) fn table_freed(&mut self, table: u64, by: Change, tables: &Tables, laws: Laws) {
        for context in &mut self.contexts {
            if context.root == table && !context.is_loaded() && context.until != 0 {
                context.expand_root(&mut self.globals, tables, laws);
                context.until = 0;
            }
        }
        let lists = self.contexts.iter_mut();
        let lists = lists.flat_map(|it| it.leaves.iter_mut().chain(it.pointers.iter_mut()));
        for held in lists.chain(self.globals.iter_mut()) {
            if held.slot & !0xfff == table && held.taken.is_none() {
                held.taken = Some(by);
            }
        }
    }

    /// What may be used in the PCID that is loaded.
    pub(super) fn usable(&self) -> impl Iterator<Item = &Held> {
        let context = self.loaded();
        let leaves = context.leaves.iter().chain(self.globals.iter());
        leaves.chain(context.pointers.iter())
    }

    /// CR3 becomes `cr3`.
    pub(super) fn load(&mut self, cr3: u64, mm: u64, at: u64, tables: &Tables, laws: Laws) {
        let pcid = cr3 & abi::channel::cr3::PCID;
        let root = cr3 & abi::pte::ADDRESS_MASK;
        let keeps = cr3 & abi::channel::cr3::NO_FLUSH != 0 && laws.obey(Law::Bit63Keeps);
        self.keep_globals(tables, laws);
        let left = &mut self.contexts[self.loaded];
        if left.pcid != pcid {
            left.until = at;
        }
        let known = self.contexts.iter().position(|it| it.pcid == pcid);
        self.loaded = known.unwrap_or_else(|| self.add(pcid));
        if !keeps && !laws.obey(Law::Cr3DropsOnePcid) {
            self.contexts.iter_mut().for_each(|it| it.clear(at));
        }
        let context = &mut self.contexts[self.loaded];
        if keeps {
            // What the PCID holds of another root stays: only the PCID tags it (5.10.1).
            if context.root != root && laws.obey(Law::PcidsAreNotRoots) {
                context.expand_root(&mut self.globals, tables, laws);
            }
        } else {
            context.clear(at);
            self.last_flush = Some((Flush::Current, at));
        }
        (context.mm, context.root, context.until) = (mm, root, u64::MAX);
        for index in 0..context.pointers.len() {
            let via = context.pointers[index];
            context.expand(&via, &mut self.globals, tables, laws);
        }
    }

    /// A PCID that was not loaded since the start.
    fn add(&mut self, pcid: u64) -> usize {
        // Of more than anybody uses one is forgotten.
        self.unknown |= self.contexts.len() == MAX_PCIDS;
        let context = Context {
            pcid,
            unknown: self.unknown,
            ..Context::default()
        };
        if self.contexts.len() < MAX_PCIDS {
            self.contexts.push(context);
            return self.contexts.len() - 1;
        }
        let other = usize::from(self.loaded == 0);
        self.contexts[other] = context;
        other
    }

    /// Writes down the global translations that the loaded tables give: they outlive CR3 (5.10.2.4).
    fn keep_globals(&mut self, tables: &Tables, laws: Laws) {
        if tables.globals == 0 || !laws.obey(Law::GlobalSurvivesCr3) {
            return;
        }
        let context = &self.contexts[self.loaded];
        let mut all = Context {
            leaves: Notes::default(),
            pointers: Notes::default(),
            settled: Vec::new(),
            ..*context
        };
        all.expand_root(&mut self.globals, tables, laws);
    }

    /// What the flush covers is gone.
    pub(super) fn flush(&mut self, flush: Flush, at: u64, tables: &Tables, laws: Laws) {
        self.last_flush = Some((flush, at));
        if matches!(flush, Flush::Fault(_)) && !laws.obey(Law::FaultsInvalidate) {
            return;
        }
        match flush {
            Flush::Invlpg(start, end) => {
                let others = !laws.obey(Law::InvlpgIsOfOnePcid);
                for (index, context) in self.contexts.iter_mut().enumerate() {
                    if index == self.loaded || others {
                        context.drop_pages(start, end, laws);
                        if start < end && laws.obey(Law::InvlpgDropsAllPointers) {
                            context.pointers.clear();
                        } else {
                            context.pointers.drop_range(start, end, laws);
                        }
                    }
                }
                if laws.obey(Law::InvlpgDropsGlobal) {
                    self.globals.drop_range(start, end, laws);
                }
            }
            Flush::Current => self.contexts[self.loaded].clear(at),
            Flush::Address(pcid, start, end) => {
                let Some(context) = self.contexts.iter_mut().find(|it| it.pcid == pcid) else {
                    return;
                };
                if !context.is_loaded() {
                    context.expand_root(&mut self.globals, tables, laws);
                    context.until = 0;
                }
                context.drop_pages(start, end, laws);
                if laws.obey(Law::InvpcidKeepsOtherPointers) {
                    context.pointers.drop_range(start, end, laws);
                } else {
                    context.pointers.clear();
                }
            }
            Flush::Pcid(pcid) => {
                if let Some(context) = self.contexts.iter_mut().find(|it| it.pcid == pcid) {
                    context.clear(at);
                }
            }
            Flush::Fault(gva) => {
                let (start, end) = (gva & !0xfff, (gva | 0xfff).saturating_add(1));
                let context = &mut self.contexts[self.loaded];
                context.drop_pages(start, end, laws);
                context.pointers.drop_range(start, end, laws);
                self.globals.drop_range(start, end, laws);
            }
            Flush::AllAndGlobal | Flush::All => {
                self.unknown = false;
                self.contexts.iter_mut().for_each(|it| it.clear(at));
                if flush == Flush::AllAndGlobal || !laws.obey(Law::OnlyType2DropsGlobal) {
                    self.globals.clear();
                }
            }
        }
    }

    /// Each translation of the page at `gva` that may be used while what is loaded is: frame and rights.
    pub(super) fn translate(&self, gva: u64, tables: &Tables, mut f: impl FnMut(u64, Rights)) {
        let page = gva & !0xfff;
        let context = self.loaded();
        if let Ok(leaf) = tables.leaf(context.root, page) {
            let offset = page & (level_size(leaf.level) - 1);
            let frame = leaf.pte.leaf_address(leaf.level) + offset;
            f(frame, leaf.rights.of_walk());
        }
        for held in context.leaves.iter().chain(self.globals.iter()) {
            if held.overlaps(page, page + 1) {
                let first = held.entry.leaf_address(held.level);
                f(first + (page - held.gva), held.rights);
            }
        }
    }
}
