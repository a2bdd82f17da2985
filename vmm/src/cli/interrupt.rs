//! Ctrl-C: the first ends the run cleanly with what was found, the second ends the process.

use std::sync::LazyLock;

use super::exit::Exit;
use crate::session::Interrupt;

static INTERRUPT: LazyLock<Interrupt> = LazyLock::new(Interrupt::default);

/// What Ctrl-C stops; the handler is installed at the first call.
pub(super) fn on_ctrl_c() -> &'static Interrupt {
    // It fails only where a handler exists, which is then ours.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPT.request() {
            std::process::exit(i32::from(Exit::Interrupted.code()));
        }
    });
    &INTERRUPT
}
