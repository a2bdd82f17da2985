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
