//! Tests of the scheduler and of the life of tasks. `bookkeeping` looks at queues and states without
//! a context switch; `life` runs whole kernels with programs on several CPUs.

mod bookkeeping;
mod life;
mod machine;
mod storm;
