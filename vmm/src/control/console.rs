//! The console: what the guest has written to its serial port.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes that are kept; a guest that writes more loses the oldest half.
const MAX_BYTES: usize = 4 << 20;

/// The log of a serial port, and where it is streamed to. Clones are the same console.
///
/// The vCPU thread only appends: a slow reader never holds it up. The I/O thread writes to the sink.
#[derive(Clone)]
pub(super) struct Console {
    shared: Arc<Shared>,
}

struct Shared {
    log: Mutex<Log>,
    sink: Mutex<Option<Box<dyn Write + Send>>>,
    ready: EventFd,
}

#[derive(Default)]
struct Log {
    bytes: Vec<u8>,
    /// How many of `bytes` the sink has seen.
    streamed: usize,
    /// `ready` has been signalled and the I/O thread has not looked yet.
    signalled: bool,
}

impl Console {
    /// An empty console.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                log: Mutex::default(),
                sink: Mutex::default(),
                ready: EventFd::new(EFD_NONBLOCK)?,
            }),
        })
    }

    /// What was written, as text.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.log().bytes).into_owned()
    }

    /// Makes what was written `text`; what the sink has seen of it is not sent again.
    pub(super) fn set_text(&self, text: &str) {
        let mut log = self.log();
        if log.bytes == text.as_bytes() {
            return;
        }
        log.bytes.clear();
        log.bytes.extend_from_slice(text.as_bytes());
        log.streamed = log.streamed.min(log.bytes.len());
    }

    /// From now on `sink` gets what is written, and first what was.
    pub(super) fn stream_to(&self, sink: Box<dyn Write + Send>) {
        *lock(&self.shared.sink) = Some(sink);
        let _ = self.shared.ready.write(1);
    }

    /// The descriptor that becomes readable when there is something to stream.
    pub(super) fn ready(&self) -> RawFd {
        self.shared.ready.as_raw_fd()
    }

    /// Writes to the sink what it has not seen. A sink that fails is given up.
    pub(super) fn stream(&self) {
        let _ = self.shared.ready.read();
        let mut sink = lock(&self.shared.sink);
        let new = {
            let mut log = self.log();
            log.signalled = false;
            if sink.is_none() {
                return;
            }
            let new = log.bytes[log.streamed..].to_vec();
            log.streamed = log.bytes.len();
            new
        };
        if let Some(to) = sink.as_mut()
            && to.write_all(&new).and_then(|()| to.flush()).is_err()
        {
            *sink = None;
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.shared.log)
    }
}

/// The serial port's sink.
impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let signal = {
            let mut log = self.log();
            if log.bytes.len() + data.len() > MAX_BYTES {
                let lost = log.bytes.len() / 2;
                log.bytes.drain(..lost);
                log.streamed = log.streamed.saturating_sub(lost);
            }
            log.bytes.extend_from_slice(data);
            !std::mem::replace(&mut log.signalled, true)
        };
        if signal {
            self.shared.ready.write(1)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A panic while a console was locked leaves text that is valid as far as it goes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_sink_gets_what_came_before_it_and_after() {
        let mut console = Console::new().unwrap();
        let sink = Sink::default();
        console.write_all(b"before ").unwrap();
        console.stream();
        console.stream_to(Box::new(sink.clone()));
        console.stream();
        console.write_all(b"after").unwrap();
        console.stream();
        console.stream();
        assert_eq!(*lock(&sink.0), b"before after");
        assert_eq!(console.text(), "before after");
    }

    #[test]
    fn a_flood_keeps_the_end() {
        let mut console = Console::new().unwrap();
        for _ in 0..3 * MAX_BYTES / 1024 {
            console.write_all(&[b'x'; 1024]).unwrap();
        }
        console.write_all(b"the end").unwrap();
        let text = console.text();
        assert!(text.len() <= MAX_BYTES);
        assert!(text.ends_with("the end"));
    }
}
