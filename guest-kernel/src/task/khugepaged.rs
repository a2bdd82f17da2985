//! The thread that gathers 2 MiB as a task. What it does is in `mm::khugepaged`.

use abi::objects::Khugepaged;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    fn khugepaged_state(&self) -> &Khugepaged {
        &self.root().khugepaged
    }

    /// Makes the thread, where the command line asks for it. Once, at boot, on CPU 0.
    ///
    /// # Panics
    /// Where memory does not suffice.
    pub(super) fn start_khugepaged(&self) {
        if self.config.khugepaged {
            let task = self.new_thread("khugepaged");
            self.khugepaged_state().task.set(task);
            self.admit_thread(task);
        }
    }

    /// What the thread does, from its first step on.
    pub(super) fn khugepaged(&self) -> ! {
        self.current().waits_for.set(0);
        loop {
            self.scan_all_for_collapse();
            self.sleep_until_woken(|| self.is_collapse_wanted());
        }
    }

    /// Wakes the thread if it sleeps. Under no lock that comes last.
    pub(crate) fn wake_khugepaged(&self) {
        self.wake_thread(self.khugepaged_state().task.get());
    }
}
