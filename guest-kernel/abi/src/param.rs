//! The kernel command line: `key=value` parameters, typed, each with a default and a help text.
//! The kernel parses its command line with [`Config::parse`]; the host checks `--param` with the
//! same function and lists the table ([`PARAMS`]).

use crate::bug::{Bug, BugSet};
use crate::objects::ASIDS;

/// Frames that munmap can collect: bounds what it has on the kernel's stack.
pub const MAX_GATHER_BATCH: usize = 128;

/// What a parameter's value looks like, for help texts.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// The key.
    pub name: &'static str,
    /// The form of the value: `on|off`, `NUMBER`, …
    pub form: &'static str,
    /// The value where none is given.
    pub default: &'static str,
    /// What it chooses.
    pub help: &'static str,
}

/// Why a command line is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamError<'a> {
    /// A word that is not `key=value`.
    NotAnAssignment(&'a str),
    /// No parameter has this name.
    UnknownName(&'a str),
    /// The value does not have the parameter's form.
    BadValue {
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: &'a str,
        /// What would be accepted.
        form: &'static str,
    },
}

trait Value: Sized {
    fn parse(text: &str) -> Option<Self>;
}

impl Value for bool {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        }
    }
}

impl Value for u64 {
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

macro_rules! choices {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ })+) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }
        impl Value for $name {
            fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
        }
    )+ };
}

choices! {
    /// How programs reach memory under test.
    TlbBackEnd {
        /// By loads and stores at CPL 3.
        Hw = "hw",
        /// Through [`crate::objects::SoftTlb`].
        Soft = "soft",
        /// Through the soft TLB, which decides, and by the processor, which is compared.
        Both = "both",
    }
    /// Whether translations of several mms are kept, told apart by PCID.
    Pcid {
        /// Where the processor has PCIDs and programs' accesses are its own (`tlb=hw`): the events of a schedule
        /// do not depend on the host.
        Auto = "auto",
        /// Yes. The soft TLB has PCIDs on every host; with `tlb=hw` or `both` the processor has to have them.
        On = "on",
        /// No: every load of CR3 flushes.
        Off = "off",
    }
    /// Where a fault may map 2 MiB at once (Linux's /sys/kernel/mm/transparent_hugepage/enabled).
    Thp {
        /// Nowhere. MADV_COLLAPSE works all the same, as in Linux.
        Never = "never",
        /// Where MADV_HUGEPAGE asks for it.
        Madvise = "madvise",
        /// Wherever MADV_NOHUGEPAGE does not forbid it.
        Always = "always",
    }
    /// What [`crate::channel::Event::stamp`] is.
    Stamp {
        /// The time stamp counter of the vCPU.
        Tsc = "tsc",
        /// A number from [`crate::objects::KernelRoot::ticket`].
        Ticket = "ticket",
    }
}

fn is_power_up_to(number: u64, most: u64) -> bool {
    number.is_power_of_two() && number <= most
}

macro_rules! params {
    ($($name:ident: $type:ty = $default:literal, $form:literal $(if $is_valid:expr)?, $help:literal;)+) => {
        /// The kernel's configuration: one field a parameter.
        #[derive(Clone, Copy, Debug)]
        pub struct Config {
            $(#[doc = $help] pub $name: $type,)+
            /// Seeded bugs that are switched on (`bug=NAME`, repeatable).
            pub bugs: BugSet,
        }

        /// Every parameter, in the order of the help text.
        pub const PARAMS: &[Param] = &[
            $(Param { name: stringify!($name), form: $form, default: $default, help: $help },)+
            Param { name: "bug", form: "NAME", default: "none",
                help: "switches a seeded bug on; may be given several times" },
        ];

        impl Default for Config {
            fn default() -> Self {
                Self {
                    $($name: <$type as Value>::parse($default).expect("defaults parse"),)+
                    bugs: BugSet::default(),
                }
            }
        }

        impl Config {
            /// Sets one parameter.
            ///
            /// # Errors
            /// An unknown name or a value of the wrong form.
            pub fn set<'a>(&mut self, name: &'a str, value: &'a str) -> Result<(), ParamError<'a>> {
                match name {
                    $(stringify!($name) => {
                        let parsed = <$type as Value>::parse(value)$(.filter($is_valid))?;
                        self.$name = parsed.ok_or(ParamError::BadValue {
                            name: stringify!($name), value, form: $form })?;
                    })+
                    "bug" => self.bugs.insert(value.parse::<Bug>().map_err(|()| {
                        ParamError::BadValue { name: "bug", value, form: "the name of a seeded bug" }
                    })?),
                    _ => return Err(ParamError::UnknownName(name)),
                }
                Ok(())
            }
        }
    };
}

params! {
    flush_ceiling: u64 = "33", "PAGES",
        "ranges of more pages are flushed as a whole address space (Linux's tlb_single_page_flush_ceiling)";
    gather_batch: u64 = "128", "1 to 128" if |n| (1..=MAX_GATHER_BATCH as u64).contains(n),
        "frames that munmap collects before it must flush and free them";
    pcp_batch: u64 = "16", "FRAMES",
        "frames that a CPU's list takes from or gives back to the buddy allocator at once (0: no per-CPU lists)";
    poison: bool = "on", "on|off",
        "freed user frames are filled with a pattern, so that a use after free is seen";
    fault_around: u64 = "1", "1|2|4|8|16" if |n| is_power_up_to(*n, 16),
        "pages that one read or write fault of an anonymous VMA maps at once";
    file_fault_around: u64 = "16", "1|2|4|…|512" if |n| is_power_up_to(*n, 512),
        "pages of a file's page cache that one read fault maps at once (Linux's fault_around_bytes)";
    thp: Thp = "madvise", "never|madvise|always",
        "where a fault of anonymous memory maps 2 MiB at once: nowhere, where MADV_HUGEPAGE asks for it, or wherever it fits";
    khugepaged: bool = "off", "on|off",
        "a thread of the kernel gathers small pages in folios of 2 MiB, where thp wants them and a fault has found no room";
    tlb: TlbBackEnd = "hw", "hw|soft|both",
        "how programs reach memory under test: by the processor, through a TLB in the kernel that keeps every entry until a flush covers it, or by both, compared";
    pcid: Pcid = "auto", "auto|on|off",
        "translations of an mm survive a switch to another one, told apart by PCID: auto is with tlb=hw where the processor has them";
    asids: u64 = "6", "1 to 6" if |n| (1..=ASIDS as u64).contains(n),
        "mms whose translations a CPU keeps with PCIDs (Linux's TLB_NR_DYN_ASIDS)";
    swap_slots: u64 = "0", "PAGES",
        "pages of the swap area on the disk; 0: anonymous memory is never reclaimed";
    swap_sector: u64 = "1024", "SECTOR",
        "where the swap area begins on the disk";
    swap_readahead: u64 = "8", "1|2|4|8" if |n| is_power_up_to(*n, 8),
        "slots that a fault reads around the one it needs (Linux's page_cluster)";
    lock_spins: u64 = "1000", "TURNS",
        "turns that a task spins for an mmap_lock before it sleeps (Linux's optimistic spinning; 0: it sleeps at once)";
    kswapd: bool = "on", "on|off",
        "a thread of the kernel reclaims before memory runs out, where there is swap";
    min_free: u64 = "0", "FRAMES",
        "with fewer free frames who allocates reclaims itself; with a quarter more kswapd is woken, with two it rests (0: by the size of memory, as Linux's min_free_kbytes)";
    groups: bool = "off", "on|off",
        "memory of processes is charged to memory groups, with limits (Linux's memory cgroups)";
    stamp: Stamp = "tsc", "tsc|ticket",
        "what events are stamped with: the time stamp counter, or a number that orders the events of all vCPUs";
}

impl Config {
    /// Parses a whole command line: words separated by blanks.
    ///
    /// # Errors
    /// The first word that is not a known, well-formed parameter.
    pub fn parse(line: &str) -> Result<Self, ParamError<'_>> {
        let mut config = Self::default();
        for word in line.split_ascii_whitespace() {
            let (name, value) = word
                .split_once('=')
                .ok_or(ParamError::NotAnAssignment(word))?;
            config.set(name, value)?;
        }
        Ok(config)
    }
}
