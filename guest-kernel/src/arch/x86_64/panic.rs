//! The end of a kernel that found itself wrong.

use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::Ordering::Relaxed;

use abi::channel::Doorbell;

use super::message::Message;
use super::percpu;
use super::registers::{halt_forever, out_bytes, out32};

/// Leaves the message in this CPU's channel and on the console, tells the host and stops this CPU.
/// Uses nothing of the kernel, which may be in any state.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    let mut text = Message::new();
    // A message that does not fit is cut; nothing else can fail.
    let _ = match info.location() {
        Some(place) => write!(
            text,
            "{} ({}:{})",
            info.message(),
            place.file(),
            place.line()
        ),
        None => write!(text, "{}", info.message()),
    };
    // SAFETY: the channel is memory that the boot page tables map for good, made of atomics. Where a
    // CPU panics before it has an area the GS base is 0, and this faults for good: the host reports
    // the triple fault.
    let channel = unsafe { &*percpu::channel() };
    for (to, from) in channel.message.iter().zip(text.words()) {
        to.store(from, Relaxed);
    }
    channel
        .message_len
        .store(text.bytes().len() as u64, Relaxed);
    out_bytes(abi::port::SERIAL, b"kernel panic: ");
    out_bytes(abi::port::SERIAL, text.bytes());
    out_bytes(abi::port::SERIAL, b"\n");
    out32(abi::port::DOORBELL, Doorbell::Panic as u32);
    halt_forever()
}
