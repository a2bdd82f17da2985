//! Processes, threads, the scheduler and the system-call table.
//!
//! Called by the back end's entry code through the upcalls of `syscall`, `fault` and `sched`; calls
//! `mm` for everything about address spaces. It never touches a page table, and its only state is in
//! `abi` objects, so that the host sees every task and every queue.
//!
//! - `create`: the first process, fork and threads. `exit`, `wait`: how they end.
//! - `sched`: who runs where; `queue` and `placement` are its parts without side effects on CPUs. `lock`: sleep for locks.
//! - `syscall`: the table and the decoding of arguments; `affinity`, `futex`, `memory`, `testbed`: calls. `disk`: the
//!   disk's driver and direct I/O. `kthread`: threads of the kernel, `kswapd` and `khugepaged`.
//! - `fault`: page faults, exceptions and interrupts. `user`: user memory and the console.
//!
//! Tasks, run queues and the queues of those who sleep for futexes and locks are protected by [`KernelRoot::sched_lock`]; where a comment
//! says "under the lock", it is that one. User memory is never touched under it but by the futex
//! check, which then refuses to fault (see `futex`).
//!
//! [`KernelRoot::sched_lock`]: abi::objects::KernelRoot::sched_lock

mod affinity;
mod create;
mod disk;
mod disk_files;
mod exit;
mod fault;
mod files;
mod futex;
mod khugepaged;
mod kswapd;
mod kthread;
mod lock;
mod memory;
mod placement;
mod queue;
mod sched;
mod syscall;
mod testbed;
mod user;
mod wait;

#[cfg(test)]
mod tests;
