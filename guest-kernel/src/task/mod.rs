//! Processes, threads, the scheduler and the system-call table.
