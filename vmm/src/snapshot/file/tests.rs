//! Which files are refused.

use proptest::prelude::*;

use super::*;

/// A file with these parts, whose sizes and digest are right.
fn file(header: &[u8], pages: &[(u32, u8)]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for number in [VERSION, header.len() as u32, pages.len() as u32] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend([0; DIGEST.end - DIGEST.start]);
    bytes.extend(header);
    bytes.extend(pages.iter().flat_map(|(number, _)| number.to_le_bytes()));
    bytes.extend(pages.iter().flat_map(|(_, byte)| [*byte; PAGE]));
    let digest = digest(&bytes);
    bytes[DIGEST].copy_from_slice(&digest);
    bytes
}

#[test]
fn the_parts_come_back_as_they_were() {
    let bytes = file(b"header", &[(3, 7), (9, 8)]);
    let (header, pages) = checked(&bytes).unwrap();
    assert_eq!(header, b"header");
    let pages: Vec<_> = pages
        .into_iter()
        .map(|(number, page)| (number, page[0], page[PAGE - 1]))
        .collect();
    assert_eq!(pages, [(3, 7, 7), (9, 8, 8)]);
}

#[test]
fn sizes_that_are_too_large_are_refused_before_anything_is_decoded() {
    let mut bytes = file(b"", &[]);
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(checked(&bytes).err().unwrap().contains("too many"));
    let mut bytes = file(b"", &[]);
    bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(checked(&bytes).err().unwrap().contains("too many"));
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let good = file(b"header", &[(3, 7)]);
    assert!(checked(&good).is_ok());
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(checked(&bad).is_err(), "bit {bit} of byte {at}");
            if at >= PREFIX {
                break; // One of what the digest covers is enough.
            }
        }
        assert!(checked(&good[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn what_can_be_no_scenario_is_told_from_one_and_refused_as_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let good = file(b"header", &[(3, 7)]);
    for (name, bytes, problem) in [
        ("empty", &b""[..], "0 bytes are too few for a snapshot or a"),
        ("abc", b"abc", "3 bytes are too few for a snapshot or a"),
        ("STA", &good[..3], "3 bytes are too few for a snapshot or a"),
        ("cut.toml", &good[..30], "is cut off: 30 bytes"),
        ("cut", &good[..100], "has 100 bytes where its sizes make"),
        ("zeroes", &[0; 64], "is no snapshot"),
        (
            "text.snapshot",
            b"[program]\nname = \"smoke\"\n",
            "is no snapshot",
        ),
    ] {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        assert!(SavedMachine::is_one(&path), "{name}");
        assert_eq!(SavedMachine::begins(&path), name.starts_with("cut"));
        let error = SavedMachine::read(&path).unwrap_err().to_string();
        assert!(error.contains(problem), "{name}: {error}");
    }
    let path = directory.path().join("scenario");
    std::fs::write(&path, "program.name=\"x\"").unwrap();
    assert!(!SavedMachine::is_one(&path));
    // The name of a scenario in scenarios/, and what has no end.
    for other in ["litmus-cow", "absent.snapshot", "/dev/zero"] {
        assert!(!SavedMachine::is_one(Path::new(other)), "{other}");
    }
}

#[test]
fn what_is_no_file_is_not_read() {
    let error = SavedMachine::read(Path::new("/dev/zero")).unwrap_err();
    assert!(error.to_string().contains("no regular file"), "{error}");
}

proptest! {
    /// Whoever makes the digest right has still no way to confuse the decoder.
    #[test]
    fn no_header_makes_it_panic(header in prop::collection::vec(any::<u8>(), 0..400)) {
        let bytes = file(&header, &[(1, 1)]);
        prop_assert!(SavedMachine::from_bytes(Path::new("x"), &bytes).is_err());
    }
}
