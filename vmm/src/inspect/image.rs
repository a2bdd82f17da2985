//! Guest memory in a `Vec`: what tests, benchmarks and saved images are looked at through.

use std::array;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

use crate::memory::{OutOfRange, PhysMem};

type Frame = [AtomicU64; ENTRIES_PER_TABLE];

/// Guest memory that no machine runs on.
pub struct MemoryImage {
    frames: Vec<Frame>,
}

impl MemoryImage {
    /// `bytes` of zeroes, rounded up to whole frames.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let frames = bytes.div_ceil(PAGE_SIZE);
        Self {
            frames: (0..frames)
                .map(|_| array::from_fn(|_| AtomicU64::new(0)))
                .collect(),
        }
    }

    /// The word that holds `gpa`.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn word(&self, gpa: u64) -> Result<&AtomicU64, OutOfRange> {
        usize::try_from(gpa / PAGE_SIZE)
            .ok()
            .and_then(|frame| self.frames.get(frame))
            .map(|frame| &frame[(gpa % PAGE_SIZE / 8) as usize])
            .ok_or(OutOfRange { gpa, len: 8 })
    }

    /// Copies `bytes` to `gpa`.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte lies outside.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.check(gpa, bytes.len() as u64)?;
        for (at, &byte) in (gpa..).zip(bytes) {
            let word = self.word(at)?;
            let mut value = word.load(Relaxed).to_le_bytes();
            value[(at % 8) as usize] = byte;
            word.store(u64::from_le_bytes(value), Relaxed);
        }
        Ok(())
    }

    /// Changes the object at `gpa`, and returns what `change` returns.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte of it lies outside.
    pub fn update<T: FromBytes + IntoBytes, R>(
        &self,
        gpa: u64,
        change: impl FnOnce(&mut T) -> R,
    ) -> Result<R, OutOfRange> {
        let mut object = T::new_zeroed();
        self.read(gpa, object.as_mut_bytes())?;
        let result = change(&mut object);
        self.write(gpa, object.as_mut_bytes())?;
        Ok(result)
    }

    fn check(&self, gpa: u64, len: u64) -> Result<(), OutOfRange> {
        match gpa.checked_add(len) {
            Some(end) if end <= self.bytes() => Ok(()),
            _ => Err(OutOfRange { gpa, len }),
        }
    }
}

impl PhysMem for MemoryImage {
    fn bytes(&self) -> u64 {
        self.frames.len() as u64 * PAGE_SIZE
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange> {
        self.check(gpa, buf.len() as u64)?;
        let mut at = gpa;
        let mut rest = buf;
        while !rest.is_empty() {
            let offset = (at % 8) as usize;
            let taken = rest.len().min(8 - offset);
            let (now, later) = rest.split_at_mut(taken);
            let word = self.word(at)?.load(Relaxed).to_le_bytes();
            now.copy_from_slice(&word[offset..offset + taken]);
            at += taken as u64;
            rest = later;
        }
        Ok(())
    }

    fn table(&self, gpa: u64) -> Result<&Frame, OutOfRange> {
        let outside = OutOfRange {
            gpa,
            len: PAGE_SIZE,
        };
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(outside);
        }
        usize::try_from(gpa / PAGE_SIZE)
            .ok()
            .and_then(|frame| self.frames.get(frame))
            .ok_or(outside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written_at_any_alignment() {
        let image = MemoryImage::new(2 * PAGE_SIZE);
        let text = b"across the edge of two frames";
        let gpa = PAGE_SIZE - 13;
        image.write(gpa, text).unwrap();
        let mut back = [0; 29];
        image.read(gpa, &mut back).unwrap();
        assert_eq!(&back, text);
    }

    #[test]
    fn refuses_what_lies_outside() {
        let image = MemoryImage::new(PAGE_SIZE);
        assert!(image.read(PAGE_SIZE - 1, &mut [0; 2]).is_err());
        assert!(image.write(u64::MAX, &[0]).is_err());
        assert!(image.table(PAGE_SIZE).is_err());
        assert!(image.table(8).is_err());
    }
}
