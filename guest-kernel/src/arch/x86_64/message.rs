//! The text that a panic leaves in the channel.

use core::fmt;

use abi::channel::MAX_MESSAGE;

/// Text cut at [`MAX_MESSAGE`] bytes, between characters.
pub(super) struct Message {
    bytes: [u8; MAX_MESSAGE],
    len: usize,
}

impl Message {
    pub(super) const fn new() -> Self {
        Self {
            bytes: [0; MAX_MESSAGE],
            len: 0,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The text and zeroes up to the end, as `Control::message` wants it.
    pub(super) fn words(&self) -> [u64; MAX_MESSAGE / 8] {
        let mut words = [0; MAX_MESSAGE / 8];
        for (word, bytes) in words.iter_mut().zip(self.bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        words
    }
}

impl fmt::Write for Message {
    /// An error where the text was cut: the rest would not follow from what is there.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut taken = text.len().min(MAX_MESSAGE - self.len);
        while !text.is_char_boundary(taken) {
            taken -= 1;
        }
        self.bytes[self.len..][..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        if taken == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Write;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_holds_the_longest_prefix_that_fits(parts in prop::collection::vec(".{0,80}", 0..12)) {
            let mut message = Message::new();
            let fitted = parts.iter().all(|part| message.write_str(part).is_ok());
            let whole = parts.concat();
            let mut stored = message.words().map(u64::to_le_bytes).concat();
            prop_assert!(stored.split_off(message.bytes().len()).iter().all(|byte| *byte == 0));
            prop_assert_eq!(&stored, message.bytes());
            let stored = String::from_utf8(stored).expect("cut between characters");
            prop_assert!(whole.starts_with(&stored));
            prop_assert_eq!(fitted, stored == whole);
            // A character has at most four bytes.
            prop_assert!(fitted || stored.len() > MAX_MESSAGE - 4);
        }
    }
}
