//! KVM's binary statistics (`KVM_GET_STATS_FD`, Linux's `Documentation/virt/kvm/api.rst` 4.133): what
//! debugfs shows, without debugfs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of `struct kvm_stats_header`.
const HEADER_BYTES: usize = 24;
/// Bytes of `struct kvm_stats_desc` before its name.
const DESC_BYTES: usize = 16;
/// A file that claims more than this is not one of KVM's.
const MAX_STATS: u32 = 4096;

/// Counters by KVM's names. Histograms are the sum of their buckets.
pub type Counters = BTreeMap<String, u64>;

/// The statistics of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct KvmStats {
    /// Of the VM.
    pub vm: Counters,
    /// Of each vCPU.
    pub vcpus: Vec<Counters>,
}

impl KvmStats {
    /// Sum of the counter `name` over VM and vCPUs; `None` where the host has no such counter.
    #[must_use]
    pub fn total(&self, name: &str) -> Option<u64> {
        std::iter::once(&self.vm)
            .chain(&self.vcpus)
            .filter_map(|counters| counters.get(name))
            .copied()
            .reduce(|sum, value| sum + value)
    }
}

/// Reads every counter of `file`.
pub(super) fn read(file: &File) -> io::Result<Counters> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let [_, name_size, count, _, desc_offset, data_offset] =
        std::array::from_fn(|word| word_at(&header, word * 4));
    if count > MAX_STATS || name_size > MAX_STATS {
        return Err(io::Error::other(format!(
            "{count} statistics with names of {name_size} bytes are not KVM's"
        )));
    }
    let stride = DESC_BYTES + name_size as usize;
    let mut descs = vec![0; stride * count as usize];
    file.read_exact_at(&mut descs, desc_offset.into())?;
    let mut counters = Counters::new();
    for desc in descs.chunks_exact(stride) {
        let size = word_at(desc, 4) >> 16;
        let offset = word_at(desc, 8);
        let name = desc[DESC_BYTES..].split(|byte| *byte == 0).next();
        let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
        let mut data = vec![0; 8 * size as usize];
        file.read_exact_at(&mut data, u64::from(data_offset) + u64::from(offset))?;
        let sum = data
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")))
            .fold(0, u64::wrapping_add);
        counters.insert(name, sum);
    }
    Ok(counters)
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn reads_the_layout_of_the_kernel() {
        let mut bytes = words(&[0, 8, 2, 0, 24, 72]);
        bytes.extend(words(&[0, 1 << 16, 8, 0]));
        bytes.extend(b"exits\0\0\0");
        bytes.extend(words(&[0, 2 << 16, 16, 0]));
        bytes.extend(b"hist\0\0\0\0");
        for value in [0u64, 41, 1, 2] {
            bytes.extend(value.to_ne_bytes());
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let counters = read(&file).unwrap();
        assert_eq!(counters["exits"], 41);
        assert_eq!(counters["hist"], 3);
    }

    #[test]
    fn a_file_that_is_something_else_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(read(&file).is_err());
        file.write_all(&[0xff; 64]).unwrap();
        assert!(read(&file).is_err());
    }

    #[test]
    fn totals_are_over_the_vm_and_its_vcpus() {
        let one = |value| Counters::from([("exits".to_owned(), value)]);
        let stats = KvmStats {
            vm: Counters::new(),
            vcpus: vec![one(2), one(3)],
        };
        assert_eq!(stats.total("exits"), Some(5));
        assert_eq!(stats.total("insn_emulation"), None);
    }
}
