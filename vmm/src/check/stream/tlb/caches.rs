//! What each vCPU may hold in its TLBs and paging-structure caches.
//!
//! What the loaded tables say now may be cached at any moment, so it is not written down. Written down
//! ([`Held`]) is what may be cached besides: translations and pointers to tables that the tables no longer
//! say, those of a PCID that were reached in another way, and global translations. While its PCID is loaded,
//! a [`Context`] is closed under filling: what a processor can reach through a pointer that it may hold is
//! written down too.

use abi::pte::{Pte, PteFlags, level_size};

use super::laws::{Law, Laws};
use super::tables::{Path, Place, Tables};

/// Most that is written down of one PCID of a vCPU: a hostile guest cannot make the host go out of memory.
const MAX_HELD: usize = 1 << 13;
/// Most flushed ranges that are noted of a PCID of unknown past.
const MAX_SETTLED: usize = 64;
/// A level above the highest: what refers to a root.
const ROOT: u8 = 5;

/// What a translation permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rights(u8);

impl Rights {
    /// Stores.
    pub(super) const WRITE: Self = Self(1);
    /// CPL 3.
    pub(super) const USER: Self = Self(2);
    /// Instruction fetches.
    pub(super) const FETCH: Self = Self(4);
    /// Stores that do not set D in the tables any more (SDM vol. 3A, 5.8).
    pub(super) const DIRTY: Self = Self(8);
    pub(super) const ALL: Self = Self(15);

    /// Of an entry as it is now: where it permits stores a processor may set D and cache it so at any time.
    pub(super) fn of(pte: Pte, level: u8) -> Self {
        let flags = pte.flags();
        let mut rights = Self(0);
        for (flag, right) in [
            (PteFlags::WRITE, Self::WRITE.0 | Self::DIRTY.0),
            (PteFlags::USER, Self::USER.0),
        ] {
            if flags.contains(flag) {
                rights.0 |= right;
            }
        }
        if !flags.contains(PteFlags::NO_EXECUTE) {
            rights.0 |= Self::FETCH.0;
        }
        if !pte.is_leaf(level) {
            rights.0 |= Self::DIRTY.0;
        }
        rights
    }
    /// Of an entry that is gone: it was never cached with D where D was not set in the end.
    pub(super) fn of_gone(pte: Pte, level: u8) -> Self {
        let rights = Self::of(pte, level);
        if pte.is_leaf(level) && !pte.flags().contains(PteFlags::DIRTY) {
            rights.without(Self::DIRTY)
        } else {
            rights
        }
    }
    /// What both permit (5.6.1: the most restrictive of all entries of a walk).
    #[must_use]
    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    #[must_use]
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    #[must_use]
    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub(super) fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Of a whole walk: D tells nothing where stores are refused.
    #[must_use]
    fn of_walk(self) -> Self {
        if self.contains(Self::WRITE) {
            self
        } else {
            self.without(Self::DIRTY)
        }
    }
    /// What matters to a program: everything but D.
    pub(super) const PROGRAM: Self = Self(7);
}

/// Who changed an entry, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// vCPU that changed it.
    pub(super) vcpu: usize,
    /// Task that ran there.
    pub(super) task: u32,
    /// Number of the event in the stream.
    pub(super) at: u64,
}

/// A translation, or a pointer to a table, that a vCPU may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) mm: u64,
    pub(super) gva: u64,
    pub(super) level: u8,
    /// Where the entry lies, and what it was.
    pub(super) slot: u64,
    pub(super) entry: Pte,
    /// Of the whole walk at that time.
    pub(super) rights: Rights,
    /// Since which event the entry was what it was.
    version: u64,
    /// Since which event it could be cached.
    pub(super) since: u64,
    /// Who took it out of the tables; none: its entry still says it.
    pub(super) taken: Option<Change>,
    /// Who unlinked the table in which its entry lies, where that was before it could be cached.
    cut: Option<Change>,
    /// What took it away is over, without a flush here: this vCPU had to flush before it uses it.
    pub(super) missed: bool,
}

impl Held {
    pub(super) fn is_leaf(&self) -> bool {
        self.entry.is_leaf(self.level)
    }
    /// What took it out of the tables.
    pub(super) fn change(&self) -> Option<Change> {
        self.taken.or(self.cut)
    }
    fn is_global(&self) -> bool {
        self.is_leaf() && self.entry.flags().contains(PteFlags::GLOBAL)
    }
    pub(super) fn bytes(&self) -> u64 {
        level_size(self.level)
    }
    pub(super) fn covers_frame(&self, gpa: u64, bytes: u64) -> bool {
        let first = self.entry.leaf_address(self.level);
        first < gpa.saturating_add(bytes) && gpa < first + self.bytes()
    }
    pub(super) fn overlaps(&self, start: u64, end: u64) -> bool {
        self.gva < end && start < self.gva.saturating_add(self.bytes())
    }
    /// True where whoever may hold `self` may do nothing more with `other`.
    fn includes(&self, other: &Self) -> bool {
        (self.slot, self.gva, self.version, self.taken)
            == (other.slot, other.gva, other.version, other.taken)
            && self.rights.contains(other.rights)
    }
}

/// A change of an entry, as it happens.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) place: Place,
    /// Root and way to the entry.
    pub(super) root: u64,
    pub(super) path: Path,
    pub(super) old: Pte,
    /// Since which event it was what it was.
    pub(super) since: u64,
    pub(super) new: Pte,
    pub(super) change: Change,
}

impl Written {
    fn is_leaf(&self) -> bool {
        self.old.is_leaf(self.place.1)
    }
    /// Entries without A were never cached (5.10.2.2). Not used for pointers: kernels set A in advance there.
    fn was_never_cached(&self, laws: Laws) -> bool {
        laws.obey(Law::OnlyAccessedIsCached)
            && self.is_leaf()
            && !self.old.flags().contains(PteFlags::ACCESSED)
    }
    /// Nothing is gone: the new entry gives all that the old one gave, to whoever may fill.
    fn gives_as_much(&self) -> bool {
        let (old, new, level) = (self.old, self.new, self.place.1);
        let kept = PteFlags::ACCESSED | PteFlags::GLOBAL;
        new.is_present()
            && old.is_leaf(level) == new.is_leaf(level)
            && old.address() == new.address()
            && Rights::of_gone(new, level).contains(Rights::of_gone(old, level))
            && (!self.is_leaf() || (old.flags() & kept) == (new.flags() & kept))
    }
}

/// What may be cached for one PCID on one vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Context {
    pub(super) pcid: u64,
    pub(super) mm: u64,
    pub(super) root: u64,
    /// What `root` gives by entries that are older is held without being written down. `u64::MAX`: it is
    /// loaded.
    until: u64,
    /// The event of its last flush of everything.
    since: u64,
    /// Something may be cached that no event told of, but for pages of `settled`.
    unknown: bool,
    settled: Vec<(u64, u64)>,
    pub(super) leaves: Vec<Held>,
    pub(super) pointers: Vec<Held>,
}

impl Context {
    fn is_loaded(&self) -> bool {
        self.until == u64::MAX
    }

    fn clear(&mut self, at: u64) {
        self.leaves.clear();
        self.pointers.clear();
        self.unknown = false;
        self.settled.clear();
        self.since = at;
        if !self.is_loaded() {
            self.until = 0;
        }
    }

    /// Pages of `start..end` are flushed.
    fn drop_pages(&mut self, start: u64, end: u64, laws: Laws) {
        drop_range(&mut self.leaves, start, end, laws);
        if self.unknown && self.settled.len() < MAX_SETTLED {
            self.settled.push((start, end));
        }
    }

    /// Writes down that `held` may be cached, and what can be reached through it.
    fn take_in(&mut self, held: Held, globals: &mut Vec<Held>, tables: &Tables, laws: Laws) {
        let list = if !held.is_leaf() {
            &mut self.pointers
        } else if !held.is_global() || !laws.obey(Law::GlobalSurvivesCr3) {
            &mut self.leaves
        } else if self.is_loaded() {
            &mut *globals
        } else {
            return; // Written down when the PCID was left.
        };
        if list.len() < MAX_HELD && !list.iter().any(|other| other.includes(&held)) {
            list.push(held);
            if !held.is_leaf() && laws.obey(Law::FillsThroughHeldPointers) {
                self.expand(&held, globals, tables, laws);
            }
        }
    }

    /// What is there behind a pointer: everything, or what was there when the PCID was left.
    fn expand(&mut self, via: &Held, globals: &mut Vec<Held>, tables: &Tables, laws: Laws) {
        if via.level <= 1 || self.leaves.len() >= MAX_HELD {
            return;
        }
        for (index, entry) in tables.present(via.entry.address()) {
            if entry.since < self.until {
                let slot = via.entry.address() + index * 8;
                let held = through(via, slot, entry.pte, entry.since, laws);
                self.take_in(held, globals, tables, laws);
            }
        }
    }

    /// Writes down all that was not.
    fn expand_root(&mut self, globals: &mut Vec<Held>, tables: &Tables, laws: Laws) {
        let root = Held {
            mm: self.mm,
            gva: 0,
            level: ROOT,
            slot: 0,
            entry: Pte(self.root),
            rights: Rights::ALL,
            version: 0,
            since: self.since,
            taken: None,
            cut: None,
            missed: false,
        };
        self.expand(&root, globals, tables, laws);
    }

    fn written(&mut self, it: &Written, globals: &mut Vec<Held>, tables: &Tables, laws: Laws) {
        resolve(&mut self.leaves, it, laws);
        resolve(&mut self.pointers, it, laws);
        let (mm, level, gva) = it.place;
        let limit = if laws.obey(Law::OnlyTheLoadedPcidFills) {
            self.until
        } else {
            u64::MAX
        };
        let was_reached = it.old.is_present()
            && self.root == it.root
            && it.path.newest < limit
            && it.since < limit;
        if was_reached && !it.was_never_cached(laws) && !(self.is_loaded() && it.gives_as_much()) {
            let of_entry = if laws.obey(Law::OnlyDirtyIsCachedDirty) {
                Rights::of_gone(it.old, level)
            } else {
                Rights::of(it.old, level)
            };
            let held = Held {
                mm,
                gva,
                level,
                slot: it.path.slot,
                entry: it.old,
                rights: combine(it.path.rights, of_entry, it.old.is_leaf(level), laws),
                version: it.since,
                since: it.since.max(it.path.newest).max(self.since),
                taken: Some(it.change),
                cut: None,
                missed: false,
            };
            self.take_in(held, globals, tables, laws);
        }
        if self.is_loaded() && it.new.is_present() && laws.obey(Law::FillsThroughHeldPointers) {
            let table = it.path.slot & !0xfff;
            for index in 0..self.pointers.len() {
                let via = self.pointers[index];
                if via.entry.address() == table && via.level == level + 1 {
                    let held = through(&via, it.path.slot, it.new, it.change.at, laws);
                    self.take_in(held, globals, tables, laws);
                }
            }
        }
    }
}

/// What a walk caches that goes on behind `via`.
fn through(via: &Held, slot: u64, pte: Pte, version: u64, laws: Laws) -> Held {
    let level = via.level - 1;
    let of_entry = Rights::of(pte, level);
    Held {
        gva: via.gva + (slot & 0xfff) / 8 * level_size(level),
        level,
        slot,
        entry: pte,
        rights: combine(via.rights, of_entry, pte.is_leaf(level), laws),
        version,
        since: via.since.max(version),
        taken: None,
        cut: via.change(),
        missed: false,
        mm: via.mm,
    }
}

fn combine(path: Rights, entry: Rights, is_leaf: bool, laws: Laws) -> Rights {
    let rights = if laws.obey(Law::RightsOfTheWholeWalk) {
        path.and(entry)
    } else {
        entry
    };
    if is_leaf { rights.of_walk() } else { rights }
}

/// What is written down of an entry that changes was taken away now, if it was ever cached.
fn resolve(list: &mut Vec<Held>, it: &Written, laws: Laws) {
    list.retain_mut(|held| {
        if held.slot != it.path.slot || held.taken.is_some() {
            return true;
        }
        if it.was_never_cached(laws) {
            return false;
        }
        held.taken = Some(it.change);
        held.entry = it.old;
        if laws.obey(Law::OnlyDirtyIsCachedDirty) {
            let of_entry = Rights::of_gone(it.old, held.level);
            held.rights = held.rights.and(of_entry);
        }
        true
    });
}

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
    pub(super) globals: Vec<Held>,
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
            globals: Vec::new(),
            last_flush: None,
        }
    }
}

impl Vcpu {
    /// Has `root` of `mm` loaded from the start.
    pub(super) fn place(&mut self, mm: u64, root: u64) {
        let context = &mut self.contexts[self.loaded];
        (context.mm, context.root) = (mm, root);
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
        resolve(&mut self.globals, it, laws);
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
        let lists = lists.flat_map(|it| it.leaves.iter_mut().chain(&mut it.pointers));
        for held in lists.chain(&mut self.globals) {
            if held.slot & !0xfff == table && held.taken.is_none() {
                held.taken = Some(by);
            }
        }
    }

    /// What may be used in the PCID that is loaded.
    pub(super) fn usable(&self) -> impl Iterator<Item = &Held> {
        let context = self.loaded();
        let leaves = context.leaves.iter().chain(&self.globals);
        leaves.chain(&context.pointers)
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
        self.loaded = known.unwrap_or_else(|| {
            self.contexts.push(Context {
                pcid,
                unknown: self.unknown,
                ..Context::default()
            });
            self.contexts.len() - 1
        });
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

    /// Writes down the global translations that the loaded tables give: they outlive CR3 (5.10.2.4).
    fn keep_globals(&mut self, tables: &Tables, laws: Laws) {
        if tables.globals == 0 || !laws.obey(Law::GlobalSurvivesCr3) {
            return;
        }
        let context = &self.contexts[self.loaded];
        let mut all = Context {
            leaves: Vec::new(),
            pointers: Vec::new(),
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
                            drop_range(&mut context.pointers, start, end, laws);
                        }
                    }
                }
                if laws.obey(Law::InvlpgDropsGlobal) {
                    drop_range(&mut self.globals, start, end, laws);
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
                    drop_range(&mut context.pointers, start, end, laws);
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
                drop_range(&mut context.pointers, start, end, laws);
                drop_range(&mut self.globals, start, end, laws);
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
        for held in context.leaves.iter().chain(&self.globals) {
            if held.overlaps(page, page + 1) {
                let first = held.entry.leaf_address(held.level);
                f(first + (page - held.gva), held.rights);
            }
        }
    }
}

/// A page of any size goes with any address in it (5.10.4.1).
fn drop_range(list: &mut Vec<Held>, start: u64, end: u64, laws: Laws) {
    list.retain(|held| {
        if laws.obey(Law::AnyAddressDropsAPage) {
            !held.overlaps(start, end)
        } else {
            !(start..end).contains(&held.gva)
        }
    });
}
