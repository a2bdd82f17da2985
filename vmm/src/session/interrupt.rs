//! Stopping whatever machine runs now, from another thread.

use std::sync::{Mutex, PoisonError};

use crate::control::InterruptHandle;

/// Stops the machine that watches it, and every later one.
#[derive(Debug, Default)]
pub struct Interrupt {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requested: bool,
    machine: Option<InterruptHandle>,
}

impl Interrupt {
    /// Asks for the stop. True where it had been asked for before.
    pub fn request(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machine) = &state.machine {
            machine.interrupt();
        }
        std::mem::replace(&mut state.requested, true)
    }

    /// True once the stop was asked for.
    pub fn requested(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requested
    }

    /// From now on the stop is for `machine`.
    pub(crate) fn watch(&self, machine: InterruptHandle) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.requested {
            machine.interrupt();
        }
        state.machine = Some(machine);
    }
}
