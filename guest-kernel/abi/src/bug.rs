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
