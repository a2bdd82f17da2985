//! The console: vm-superio's 16550 without interrupts (the kernel writes and never waits).

use std::convert::Infallible;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::bus::{Device, Effect};

/// The kernel does not use the serial port's interrupt.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

type Port = Serial<NoInterrupt, NoEvents, Box<dyn Write + Send>>;

/// The registers of a [`SerialPort`], in the order of vm-superio's `SerialState`. Nothing is ever put
/// into its receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SerialRegisters([u8; 9]);

/// A serial port that writes what the guest sends to a sink.
pub struct SerialPort {
    port: Mutex<Port>,
}

impl SerialPort {
    /// A port whose output goes to `sink`.
    #[must_use]
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self {
            port: Mutex::new(Serial::new(NoInterrupt, sink)),
        }
    }

    /// Its registers now.
    #[must_use]
    pub fn registers(&self) -> SerialRegisters {
        let state = self.with(|port| port.state());
        SerialRegisters([
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ])
    }

    /// A port with these registers whose output goes to `sink`.
    #[must_use]
    pub fn with_registers(registers: SerialRegisters, sink: Box<dyn Write + Send>) -> Self {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = registers.0;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let port = Serial::from_state(&state, NoInterrupt, NoEvents, sink)
            .expect("an empty receive buffer is not too long");
        Self {
            port: Mutex::new(port),
        }
    }

    /// Puts the registers back.
    pub fn set_registers(&self, registers: SerialRegisters, sink: Box<dyn Write + Send>) {
        if self.registers() != registers {
            let Self { port } = Self::with_registers(registers, sink);
            let port = port.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.with(|old| *old = port);
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut Port) -> R) -> R {
        // A panic while the lock was held leaves the port's registers valid.
        f(&mut self.port.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Device for SerialPort {
    fn name(&self) -> &'static str {
        "serial"
    }
    fn read(&self, _cpu: usize, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.with(|port| port.read(offset));
        }
    }
    fn write(&self, _cpu: usize, offset: u64, data: &[u8]) -> Effect {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // A sink that fails (a closed pipe) loses console text, not the run.
            let _ = self.with(|port| port.write(offset, *byte));
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_written_reach_the_sink() {
        let sink = Sink::default();
        let port = SerialPort::new(Box::new(sink.clone()));
        for byte in b"hello" {
            port.write(0, 0, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn line_status_says_that_the_transmitter_is_empty() {
        let port = SerialPort::new(Box::new(Sink::default()));
        let mut status = [0];
        port.read(0, 5, &mut status);
        assert_ne!(status[0] & 0x20, 0);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let sink = Sink::default();
        let port = SerialPort::new(Box::new(sink.clone()));
        port.write(0, 0, &[1, 2]);
        port.write(0, 999, &[1]);
        let mut word = [0; 4];
        port.read(0, 0, &mut word);
        assert_eq!(word, [0xff; 4]);
        assert!(sink.0.lock().unwrap().is_empty());
    }
}
