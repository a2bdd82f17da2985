//! Address ranges and the devices behind them. One bus for port I/O, one for MMIO.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::lapic::IpiRequest;

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest rang the doorbell with this value (see [`abi::channel::Doorbell`]); the vCPU waits.
    Doorbell(u32),
    /// The guest ends the run with this status.
    Exit(u32),
    /// An interrupt was requested; it is delivered when the host says so.
    Ipi(IpiRequest),
    /// A request was given to the disk.
    Disk {
        /// By this CPU.
        cpu: usize,
        /// GPA of the [`abi::disk::DiskRequest`].
        request: u64,
    },
}

/// A device model. `cpu` is the vCPU that makes the access, `offset` counts from the start of the
/// device's range. Accesses of any length and value may come: the guest is hostile.
pub trait Device: Send + Sync {
    /// Name for messages.
    fn name(&self) -> &'static str;
    /// Fills `data`.
    fn read(&self, cpu: usize, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, cpu: usize, offset: u64, data: &[u8]) -> Effect;
}

/// A range that overlaps one already on the bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} at {:#x}..{:#x} overlaps {other}", .range.start, .range.end)]
pub struct Overlap {
    name: &'static str,
    range: Range<u64>,
    other: &'static str,
}

/// An access to an address that no device claims as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no device at {address:#x} (+{len} bytes)")]
pub struct Unclaimed {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: usize,
}

/// Address ranges, each with its device.
#[derive(Default)]
pub struct Bus {
    /// By start of range: its end and the device. Ranges are disjoint.
    ranges: BTreeMap<u64, (u64, Arc<dyn Device>)>,
}

impl Bus {
    /// Puts `device` at `range`.
    ///
    /// # Errors
    /// Where another device has part of the range.
    ///
    /// # Panics
    /// On an empty range.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn Device>) -> Result<(), Overlap> {
        assert!(!range.is_empty(), "{} with an empty range", device.name());
        let before = self.ranges.range(..range.end).next_back();
        if let Some((_, (end, other))) = before
            && *end > range.start
        {
            return Err(Overlap {
                name: device.name(),
                range,
                other: other.name(),
            });
        }
        self.ranges.insert(range.start, (range.end, device));
        Ok(())
    }

    /// Reads from the device at `address`.
    ///
    /// # Errors
    /// Where no device has the whole access; `data` is then unchanged.
    pub fn read(&self, cpu: usize, address: u64, data: &mut [u8]) -> Result<(), Unclaimed> {
        let (offset, device) = self.find(address, data.len())?;
        device.read(cpu, offset, data);
        Ok(())
    }

    /// Writes to the device at `address`.
    ///
    /// # Errors
    /// Where no device has the whole access.
    pub fn write(&self, cpu: usize, address: u64, data: &[u8]) -> Result<Effect, Unclaimed> {
        let (offset, device) = self.find(address, data.len())?;
        Ok(device.write(cpu, offset, data))
    }

    fn find(&self, address: u64, len: usize) -> Result<(u64, &dyn Device), Unclaimed> {
        let unclaimed = Unclaimed { address, len };
        let (start, (end, device)) = self.ranges.range(..=address).next_back().ok_or(unclaimed)?;
        let last = address.checked_add(len as u64).ok_or(unclaimed)?;
        if last > *end || address >= *end {
            return Err(unclaimed);
        }
        Ok((address - start, device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static str);
    impl Device for Named {
        fn name(&self) -> &'static str {
            self.0
        }
        fn read(&self, _cpu: usize, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _cpu: usize, offset: u64, _data: &[u8]) -> Effect {
            Effect::Doorbell(offset as u32)
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.insert(0x10..0x18, Arc::new(Named("a"))).unwrap();
        bus.insert(0x20..0x21, Arc::new(Named("b"))).unwrap();
        bus
    }

    #[test]
    fn routes_by_range_with_the_offset() {
        let bus = bus();
        let mut byte = [0xee];
        bus.read(0, 0x13, &mut byte).unwrap();
        assert_eq!(byte, [3]);
        assert_eq!(bus.write(0, 0x20, &[1]), Ok(Effect::Doorbell(0)));
    }

    #[test]
    fn refuses_what_no_device_has_whole() {
        let bus = bus();
        for (address, len) in [(0x0f, 1), (0x18, 1), (0x17, 2), (0x21, 1), (u64::MAX, 4)] {
            let mut data = vec![0xee; len];
            assert_eq!(
                bus.read(0, address, &mut data),
                Err(Unclaimed { address, len })
            );
            assert_eq!(data, vec![0xee; len]);
        }
    }

    #[test]
    fn refuses_overlap() {
        let mut bus = bus();
        for range in [0x17..0x19, 0x0f..0x11, 0x00..0x40, 0x12..0x13] {
            assert!(bus.insert(range, Arc::new(Named("c"))).is_err());
        }
        bus.insert(0x18..0x20, Arc::new(Named("c"))).unwrap();
    }
}
