//! Exit port: a 4-byte write at offset 0 ends the run with that status.

use crate::bus::{Device, Effect};

/// The exit port.
#[derive(Debug, Default)]
pub struct ExitPort;

impl Device for ExitPort {
    fn name(&self) -> &'static str {
        "exit"
    }
    fn read(&self, _cpu: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _cpu: usize, offset: u64, data: &[u8]) -> Effect {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(word)) => Effect::Exit(u32::from_le_bytes(word)),
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_word_exits() {
        let port = ExitPort;
        assert_eq!(port.write(0, 0, &3u32.to_le_bytes()), Effect::Exit(3));
        assert_eq!(port.write(0, 0, &[3, 0]), Effect::None);
    }
}
