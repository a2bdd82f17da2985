//! Tests of the scheduler and of the life of tasks. `bookkeeping` looks at queues and states without
//! a context switch; `life` runs whole kernels with programs on several CPUs,
//! `kswapd`, `khugepaged` and `locks` on the model's coroutines.

mod bookkeeping;
mod direct;
mod disk_files;
mod files;
#[cfg(feature = "testbed")]
mod khugepaged;
#[cfg(feature = "testbed")]
mod kswapd;
mod life;
#[cfg(feature = "testbed")]
mod locks;
mod machine;
#[cfg(feature = "testbed")]
mod rig;
mod storm;
