//! Seeded bugs: historical mistakes that can be switched on with `--bug NAME` (kernel parameter
//! `bug=NAME`). The catalogue with the interleavings is in `docs/bugs.md`.

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $variant:ident = $bit:literal, $name:literal;)+) => {
        /// One seeded bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Bug { $($(#[doc = $doc])+ $variant = $bit,)+ }
        impl Bug {
            /// Every bug, in order.
            pub const ALL: &'static [Bug] = &[$(Bug::$variant,)+];
            /// The name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Bug::$variant => $name,)+ }
            }
            /// What it does, in one paragraph.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Bug::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

bugs! {
    /// munmap, mprotect and madvise flush only the TLB of the CPU that calls them: other CPUs of
    /// the mm keep translations to frames that are then reused.
    ShootdownSkipRemote = 0, "shootdown-skip-remote";
    /// fork write-protects the parent's pages without flushing: other threads of the parent keep
    /// writing frames that the child now shares.
    ForkNoWriteprotectFlush = 1, "fork-no-writeprotect-flush";
    /// munmap and madvise return frames to the allocator before the flush that covers them.
    FreeBeforeFlush = 2, "free-before-flush";
    /// munmap drops the mmap_lock before it flushes (class C1, B1's order): another thread can map and
    /// fill the same addresses while a CPU still has translations of the old frames.
    MunmapFlushAfterUnlock = 3, "munmap-flush-after-unlock";
    /// munmap, mprotect and madvise flush a range that is one page too short (class C2).
    FlushRangeShort = 4, "flush-range-short";
    /// madvise(MADV_DONTNEED) that finds entries already none does not flush, though another thread
    /// has cleared them and not flushed yet (class C3, B5; Linux 4647706ebeee).
    DontneedSkipNone = 5, "dontneed-skip-none";
    /// A CPU loads CR3 before its bit is in the mm's cpumask (class C5, B17, CVE-2016-2069): a flusher
    /// that looks between the two misses it.
    Cr3BeforeCpumask = 6, "cr3-before-cpumask";
    /// The flusher skips CPUs whose loaded mm is another one, and so those that are in the middle of
    /// switching to this one (class C5, B15, CVE-2025-37964).
    FlushSkipSwitching = 7, "flush-skip-switching";
    /// A flush that frees page-table pages skips lazy CPUs as if only leaf entries had changed (class
    /// C8, B14, CVE-2025-22045): they may still walk the freed tables.
    FreedTablesSkipLazy = 8, "freed-tables-skip-lazy";
    /// A CPU that stops being lazy reuses its CR3 without a look at what was flushed meanwhile (class
    /// C15).
    LazyReuseNoFlush = 9, "lazy-reuse-no-flush";
    /// A copy-on-write fault puts the new page in place, drops the page-table lock and gives the old
    /// frame back before it flushes (class C1): other CPUs still read the old frame.
    CowFreeBeforeFlush = 10, "cow-free-before-flush";
    /// Flushes are numbered with a load and a store where a locked add belongs: two flushers of one mm can
    /// get one number, and who has flushed for the first takes the second for done. No scheduling
    /// point lies between the two: only instruction-granular schedules find it.
    TlbGenPlainAdd = 11, "tlb-gen-plain-add";
    /// munmap and madvise count a mapping less only after they have dropped the page-table lock under which
    /// they cleared its entry: an rmap walk in between counts fewer entries than mappings.
    MapcountAfterUnlock = 12, "mapcount-after-unlock";
    /// A CPU that was lazy in one mm and switches to another still counts as lazy when it has loaded the new
    /// CR3: who changes entries of the new mm in that window passes it by (class C5). This kernel had it, until
    /// exploration found it in its 60,306th schedule of `litmus-fork`.
    SwitchClearsLazyLate = 13, "switch-clears-lazy-late";
    /// Page-table pages are freed as soon as they are flushed, without a grace period (class C8; B12 ii,
    /// Linux 2ba99c5e0881): a walker on a CPU that does not have the mm loaded, which no flush reaches, may be inside
    /// them.
    TablesFreeWithoutGracePeriod = 14, "tables-free-without-grace-period";
    /// A flush of a range invalidates one page in every 2 MiB, as if entries of level 2 had changed and not of level 1
    /// (class C2: the wrong level): the other pages stay cached, on the flusher's CPU too.
    FlushWrongLevel = 15, "flush-wrong-level";
    /// With PCIDs, a CPU that gives a slot to another mm loads it without a flush (class C15; SDM vol. 3A,
    /// 5.10.4.1): the mm uses translations that the slot's last mm has left.
    PcidReuseNoFlush = 16, "pcid-reuse-no-flush";
    /// With PCIDs, a CPU that comes back to an mm keeps what its slot holds without a look at what was flushed
    /// meanwhile (class C15; Linux choose_new_asid): no shootdown reaches a CPU that has left the mm.
    PcidSkipStaleGen = 17, "pcid-skip-stale-gen";
    /// get_user_pages without a lock keeps the page that it found, without looking again whether the entry is still
    /// what it was and whether a fork was at work (Linux 57efa1fe5957): the page may be shared by then, and the
    /// next write of the process goes to a copy that the device does not know.
    GupFastNoRecheck = 40, "gup-fast-no-recheck";
    /// fork shares pages that a device uses as it shares all others, and write-protects them (before Linux 70e806e4e645):
    /// the next write of the parent goes to a copy, and what the device reads lands in the child's page.
    ForkSharesPinned = 41, "fork-shares-pinned";
    /// fallocate(PUNCH_HOLE) takes a page out of the page cache before it unmaps it, and gives the mappings'
    /// references back before the flush (class C1): other CPUs still use the frame through the mapping.
    PunchFreeBeforeFlush = 18, "punch-free-before-flush";
    /// mremap flushes the old place only after it has dropped the page-table locks and the mmap_lock (class C1, the order
    /// of CVE-2018-18281, Linux eb66ae030829): who maps the old place anew still reaches the pages that have moved, and who
    /// unmaps those at their new place frees frames that CPUs still reach.
    MremapFlushAfterUnlock = 24, "mremap-flush-after-unlock";
    /// mremap does not flush where it moves a whole page table instead of its entries (class C2, the wrong level): the
    /// old place stays cached.
    MremapTableNoFlush = 25, "mremap-table-no-flush";
    /// mprotect, munmap and madvise do not look whether reclaim has cleared entries of the mm and not flushed yet (class
    /// C3, B3; Linux 3ea277194daa): they return while other CPUs still write the pages.
    BatchedFlushIgnored = 46, "batched-flush-ignored";
    /// Reclaim writes pages out and frees them before the flush that it has put off for the whole batch (class C1;
    /// Linux's try_to_unmap_flush in shrink_folio_list): other CPUs still use the frames.
    ReclaimFreeBeforeFlush = 47, "reclaim-free-before-flush";
    /// mremap moves entries without the locks of walks back from folios (class C12, B26; Linux 486cf46f3f9b): it moves a
    /// migration entry behind the walk that ends the migration, which misses it, and leaves it referring to a frame that
    /// is free.
    MremapNoRmapLocks = 30, "mremap-no-rmap-locks";
    /// Migration copies a page before it flushes the entries that it has taken out (class C7, B8): what a program writes
    /// meanwhile through a stale translation is lost.
    MigrateCopyBeforeFlush = 31, "migrate-copy-before-flush";
    /// An entry of 2 MiB is replaced by a table of small ones at once, without being made invalid and flushed between
    /// (class C2; Linux __split_huge_pmd_locked, pmdp_invalidate): a TLB may hold the page in both sizes, which
    /// the SDM forbids software to rely on, and errata punish (AMD erratum 383).
    HugeSplitNoFlush = 44, "huge-split-no-flush";
    /// Collapsing copies 512 small pages before the flush that ends their use, not after it (class C1; Linux
    /// pmdp_collapse_flush): what other CPUs still write to a page that was copied is lost.
    CollapseCopyBeforeFlush = 45, "collapse-copy-before-flush";
    /// A fault that finds the page there when it has made one gives its own back, and does not uncharge it: the memory
    /// group's usage grows with every such race (a count that the failure path leaks).
    ChargeKeptOnRace = 50, "charge-kept-on-race";
    /// What is freed is uncharged from the group that the process is in now, and not from the one that it was charged to,
    /// which is another one after a move (Linux keeps folio->memcg_data for this).
    UnchargeCurrentGroup = 51, "uncharge-current-group";
    /// Pages of a file on the disk are made clean and read-only for write-back, and not flushed (class C16; Linux
    /// page_vma_mkclean_one): another CPU goes on to write them through a stale translation, and nobody learns that
    /// they are dirty.
    MkcleanNoFlush = 56, "mkclean-no-flush";
    /// Unmapping a dirty page of a file counts its mapping less before the flush (class C6, B7; Linux 5df397dec7c4):
    /// write-back finds it unmapped, does not wait, and cleans it while other CPUs still write it.
    ZapLosesDirty = 57, "zap-loses-dirty";
    /// Reclaim takes the entry of a dirty page of a file away and flushes with the rest of its batch, though the page counts
    /// as not mapped already (class C6; Linux keeps the folio locked until try_to_unmap_flush_dirty): write-back finds it
    /// unmapped and cleans it while other CPUs still write it.
    ReclaimLosesDirty = 58, "reclaim-loses-dirty";
    /// A fault takes a VMA that it has found without the mmap_lock for its own mm's and does not ask: its memory may be a VMA of
    /// another process by now (class C9, B21, CVE-2025-38554).
    VmaMmUnchecked = 59, "vma-mm-unchecked";
    /// fork copies a VMA that it has not locked: a fault that holds nothing but the VMA changes entries while they
    /// are being copied (class C10, B22; Linux fb49c455323f).
    ForkParentVmaUnlocked = 60, "fork-parent-vma-unlocked";
    /// mprotect, madvise and mlock change the flags of a VMA that they have not locked (class C10): a fault that has read the
    /// old permission installs an entry with it when mprotect has passed by.
    VmaFlagsUnlocked = 61, "vma-flags-unlocked";
    /// Nodes of the VMA tree are free as soon as nothing leads to them (class C9, B20, CVE-2023-3269): a fault
    /// that looks for its VMA under RCU may be at one.
    VmaNodesWithoutGracePeriod = 62, "vma-nodes-without-grace-period";
}

/// A set of seeded bugs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BugSet(u64);

impl BugSet {
    /// True where `bug` is switched on.
    #[must_use]
    pub const fn has(self, bug: Bug) -> bool {
        self.0 & (1 << bug as u8) != 0
    }
    /// Switches `bug` on.
    pub const fn insert(&mut self, bug: Bug) {
        self.0 |= 1 << bug as u8;
    }
    /// True where no bug is on.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl core::str::FromStr for Bug {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Bug::ALL
            .iter()
            .copied()
            .find(|bug| bug.name() == name)
            .ok_or(())
    }
}
