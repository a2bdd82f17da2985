//! The reclaim thread as a task. What it does is in `mm::kswapd`. Programs that leave it no CPU reclaim themselves.

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    /// Makes the thread, where the command line asks for swap and not against it. Once, at boot, on CPU 0.
    ///
    /// # Panics
    /// Where memory does not suffice.
    pub(super) fn start_kswapd(&self) {
        if self.config.swap_slots == 0 || !self.config.kswapd {
            return;
        }
        let task = self.new_thread("kswapd");
        self.set_default_watermarks();
        self.root().kswapd.task.set(task);
        self.admit_thread(task);
        if self.is_memory_low() {
            self.wake_kswapd();
        }
    }

    /// What the thread does, from its first step on.
    pub(super) fn kswapd(&self) -> ! {
        self.current().waits_for.set(0);
        loop {
            self.balance();
            // Linux's kswapd_try_to_sleep.
            self.sleep_until_woken(|| self.is_memory_low());
        }
    }

    /// Wakes the thread if it sleeps (Linux's `wakeup_kswapd`). Under no lock that comes last.
    pub(crate) fn wake_kswapd(&self) {
        if let Some(task) = self.root().kswapd.task.get().some() {
            self.wake_thread(task);
        }
    }
}
