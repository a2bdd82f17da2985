//! Doorbell of the testbed channel: a 4-byte write at offset 0, its value an
//! [`abi::channel::Doorbell`]. What it is about lies in the vCPU's channel page, which the machine
//! reads; the device keeps no state.

use crate::bus::{Device, Effect};

/// The doorbell port.
#[derive(Debug, Default)]
pub struct DoorbellPort;

impl Device for DoorbellPort {
    fn name(&self) -> &'static str {
        "doorbell"
    }
    fn read(&self, _cpu: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _cpu: usize, offset: u64, data: &[u8]) -> Effect {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(word)) => Effect::Doorbell(u32::from_le_bytes(word)),
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_word_rings() {
        let port = DoorbellPort;
        assert_eq!(port.write(0, 0, &7u32.to_le_bytes()), Effect::Doorbell(7));
        assert_eq!(port.write(0, 0, &[7]), Effect::None);
        assert_eq!(port.write(0, 1, &[7, 0, 0]), Effect::None);
    }
}
