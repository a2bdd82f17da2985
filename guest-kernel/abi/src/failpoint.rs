//! Failpoints: named places in the kernel where the host can make an operation fail.

macro_rules! failpoints {
    ($($variant:ident = $id:literal, $name:literal, $help:literal;)+) => {
        /// One failpoint.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Failpoint { $(#[doc = $help] $variant = $id,)+ }
        impl Failpoint {
            /// Every failpoint.
            pub const ALL: &'static [Failpoint] = &[$(Self::$variant,)+];
            /// The name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
            /// What fails.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)+ }
            }
            /// The failpoint with number `id`.
            #[must_use]
            pub fn from_id(id: u64) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

failpoints! {
    FrameAlloc = 0, "frame-alloc", "the allocation of a frame or a block of frames finds none";
    SlabAlloc = 1, "slab-alloc", "the allocation of a kernel object finds no memory";
}

impl core::str::FromStr for Failpoint {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL
            .iter()
            .copied()
            .find(|failpoint| failpoint.name() == name)
            .ok_or(())
    }
}
