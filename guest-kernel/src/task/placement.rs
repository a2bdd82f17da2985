//! Which CPU a task that becomes ready goes to. Pure, so that it is tested without a machine.

use crate::arch::CpuMask;

/// What placement knows of a CPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// It has entered the scheduler.
    pub(super) online: bool,
    /// Tasks that run or wait to run there: 0 exactly while it is idle.
    pub(super) tasks: u64,
}

/// The CPU for a task that may run on `allowed`: an idle one first, else the least loaded, the
/// lowest-numbered of equals; a CPU that is still booting only where nothing else is allowed.
/// `loads` are the machine's CPUs in order.
pub(super) fn choose_cpu(allowed: CpuMask, loads: impl Iterator<Item = Load>) -> Option<usize> {
    loads
        .enumerate()
        .filter(|(cpu, _)| allowed & (1 << cpu) != 0)
        .min_by_key(|(_, load)| (!load.online, load.tasks))
        .map(|(cpu, _)| cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn loads(tasks: &[u64]) -> impl Iterator<Item = Load> {
        tasks.iter().map(|&tasks| Load {
            online: true,
            tasks,
        })
    }

    #[test]
    fn an_idle_cpu_is_preferred_and_ties_go_to_the_lowest() {
        assert_eq!(choose_cpu(0b1111, loads(&[1, 0, 0, 2])), Some(1));
        assert_eq!(choose_cpu(0b1101, loads(&[1, 0, 3, 1])), Some(0));
        assert_eq!(choose_cpu(0b1000, loads(&[0, 0, 0, 9])), Some(3));
        assert_eq!(choose_cpu(0b10000, loads(&[0, 0, 0, 9])), None);
    }

    #[test]
    fn a_booting_cpu_is_the_last_resort() {
        let machine = [(true, 7), (false, 0)];
        let loads = |()| {
            machine
                .into_iter()
                .map(|(online, tasks)| Load { online, tasks })
        };
        assert_eq!(choose_cpu(0b11, loads(())), Some(0));
        assert_eq!(choose_cpu(0b10, loads(())), Some(1));
    }

    proptest! {
        #[test]
        fn the_choice_is_allowed_and_no_allowed_cpu_is_better(
            allowed in 1u64..0x1_0000,
            machine in prop::collection::vec((any::<bool>(), 0u64..4), 16),
        ) {
            let all: Vec<Load> =
                machine.iter().map(|&(online, tasks)| Load { online, tasks }).collect();
            let cpu = choose_cpu(allowed, all.iter().copied()).expect("some CPU is allowed");
            prop_assert!(allowed & (1 << cpu) != 0);
            for (other, load) in all.iter().enumerate().filter(|(i, _)| allowed & (1 << i) != 0) {
                if load.online {
                    prop_assert!(all[cpu].online && all[cpu].tasks <= load.tasks);
                }
                if (load.online, load.tasks) == (all[cpu].online, all[cpu].tasks) {
                    prop_assert!(cpu <= other);
                }
            }
        }
    }
}
