//! I/O ports of the machine. All of them are ours but the serial port, which sits where PCs have it.

/// 16550 serial port, eight registers.
pub const SERIAL: u16 = 0x3f8;
/// Number of serial registers.
pub const SERIAL_LEN: u16 = 8;
/// Doorbell of the testbed channel: a 4-byte `out` of a [`crate::channel::Doorbell`] value.
pub const DOORBELL: u16 = 0x510;
/// A 4-byte `out` ends the run; the value is the exit status of the first process.
pub const EXIT: u16 = 0x514;
/// A 4-byte `out` of the GPA of a [`crate::disk::DiskRequest`] gives it to the disk.
pub const DISK: u16 = 0x518;
