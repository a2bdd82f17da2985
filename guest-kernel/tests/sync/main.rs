//! The kernel's locks and RCU under [loom], which runs every interleaving and every value that the memory
//! model lets a load give. Each algorithm is the kernel's own, over loom's atomics ([`word`]); each ordering
//! rule that its file writes down has a test that fails without it.
#![allow(unsafe_code, reason = "the data under a lock that is tested")]

mod grace;
mod locks;
mod rwsem;
mod seqcount;
mod shootdown;
mod srcu;
mod vma_lock;
mod word;
