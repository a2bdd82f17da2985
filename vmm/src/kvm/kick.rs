//! Waking a vCPU thread, wherever it is.
//!
//! The kick signal is blocked in the thread at all times, but not inside KVM_RUN, which takes its own
//! mask (KVM_SET_SIGNAL_MASK). A kick that comes early therefore stays pending and makes the next
//! KVM_RUN return EINTR at once: it cannot be lost between a look at the command queue and the entry,
//! and no handler ever runs. The same pending signal ends the wait of a halted vCPU.
#![allow(unsafe_code, reason = "signals and the kvm_run mapping")]

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The signal. It is only ever sent to threads that block it.
const KICK: libc::c_int = libc::SIGUSR1;
/// Signals of the thread's own faults: blocking them would turn a crash into a silent kill.
const SYNCHRONOUS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// Where kicks for one vCPU go.
#[derive(Debug, Default)]
pub(crate) struct Kick {
    /// The thread, while it exists and blocks the signal. Held for the length of one `tgkill`, so
    /// that the ID cannot have been given to another thread.
    thread: Mutex<Option<libc::pid_t>>,
}

impl Kick {
    /// Wakes the thread, if there is one.
    pub(crate) fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tid) = *thread {
            // SAFETY: signals a thread of this process that blocks the signal; no memory is involved.
            // It exists, because it takes itself out of `thread` before it ends.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, KICK);
            }
        }
    }
}

/// The receiving end, owned by the vCPU thread.
pub(super) struct Receiver {
    kick: Arc<Kick>,
    /// Signal state belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl Receiver {
    /// Blocks signals in the calling thread and lets `kick` reach it.
    pub(super) fn attach(kick: Arc<Kick>) -> io::Result<Self> {
        // SAFETY: the set is initialised by sigfillset before it is used; no other memory is touched.
        let result = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut set);
            for signal in SYNCHRONOUS {
                libc::sigdelset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the call takes nothing and cannot fail.
        let tid = unsafe { libc::gettid() };
        *kick.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(tid);
        Ok(Self {
            kick,
            not_send: PhantomData,
        })
    }

    /// The mask for KVM_SET_SIGNAL_MASK: as in the thread, less the kick.
    pub(super) fn mask_in_guest() -> u64 {
        SYNCHRONOUS
            .iter()
            .chain([&KICK])
            .fold(u64::MAX, |mask, signal| mask & !(1 << (signal - 1)))
    }

    /// Takes a pending kick, if there is one: to be called after EINTR, before the look at what it
    /// was for.
    pub(super) fn drain(&self) {
        while self.take(Some(libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        })) {}
    }

    /// Waits for a kick and takes it.
    pub(super) fn wait(&self) {
        while !self.take(None) {}
    }

    /// Waits for a kick and takes it, or until `time` is over.
    pub(super) fn wait_for(&self, time: Duration) {
        self.take(Some(libc::timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: time.subsec_nanos().into(),
        }));
    }

    fn take(&self, timeout: Option<libc::timespec>) -> bool {
        // SAFETY: the set is initialised before use; sigtimedwait reads it and the timeout, which
        // outlive the call, and writes nothing.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, KICK);
            let timeout = timeout
                .as_ref()
                .map_or(std::ptr::null(), std::ptr::from_ref);
            libc::sigtimedwait(&set, std::ptr::null_mut(), timeout) == KICK
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut thread = self
            .kick
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *thread = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_kick_before_the_wait_is_not_lost_and_kicks_coalesce() {
        let kick = Arc::new(Kick::default());
        kick.kick(); // nobody there: no effect
        let (ready, is_ready) = mpsc::channel();
        let (woken, is_woken) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let thread = std::thread::spawn({
            let kick = Arc::clone(&kick);
            move || {
                let receiver = Receiver::attach(kick).unwrap();
                ready.send(()).unwrap();
                may_go.recv().unwrap();
                receiver.wait();
                receiver.drain();
                woken.send(()).unwrap();
                receiver.wait();
                woken.send(()).unwrap();
            }
        });
        is_ready.recv().unwrap();
        for _ in 0..10 {
            kick.kick();
        }
        go.send(()).unwrap();
        is_woken.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(is_woken.recv_timeout(Duration::from_millis(20)).is_err());
        kick.kick();
        is_woken.recv_timeout(Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
        kick.kick(); // gone: no effect
    }

    #[test]
    fn the_guest_mask_lets_only_the_kick_and_own_faults_through() {
        let open: Vec<_> = (1..=64)
            .filter(|signal| Receiver::mask_in_guest() & 1 << (signal - 1) == 0)
            .collect();
        assert!(open.contains(&KICK));
        assert!(!open.contains(&libc::SIGINT));
        assert_eq!(open.len(), SYNCHRONOUS.len() + 1);
    }
}
