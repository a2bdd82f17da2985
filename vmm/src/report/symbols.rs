//! Names and source lines of addresses in a guest image, from its symbol table and its DWARF.

use std::borrow::Cow;

use addr2line::{Context, LookupResult};
use gimli::{EndianSlice, LittleEndian};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use serde::Serialize;

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// Where an address lies in the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Location {
    /// The function, demangled; with an offset where only the symbol table knows the address.
    pub function: String,
    /// Source file, where DWARF has it; relative to the sources of this program or of Rust's library.
    pub file: Option<String>,
    /// Line in `file`.
    pub line: Option<u32>,
    /// True where this function was inlined into the next one of the list.
    pub inlined: bool,
}

/// The debug information of an image. An image without any resolves nothing: a report that is short
/// of names is still a report.
pub struct Symbols<'a> {
    dwarf: Option<Context<Reader<'a>>>,
    /// Functions by address: first address, bytes, name.
    functions: Vec<(u64, u64, &'a str)>,
}

impl<'a> Symbols<'a> {
    /// Reads what `elf` has; nothing of a file that is not an ELF file.
    #[must_use]
    pub fn of(elf: &'a [u8]) -> Self {
        let Ok(file) = object::File::parse(elf) else {
            return Self {
                dwarf: None,
                functions: Vec::new(),
            };
        };
        let section = |id: gimli::SectionId| {
            let data = file
                .section_by_name(id.name())
                .and_then(|section| section.data().ok())
                .unwrap_or_default();
            Ok::<_, gimli::Error>(EndianSlice::new(data, LittleEndian))
        };
        let dwarf = gimli::Dwarf::load(section)
            .and_then(Context::from_dwarf)
            .ok();
        let mut functions: Vec<_> = file
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition())
            .filter_map(|symbol| Some((symbol.address(), symbol.size(), symbol.name().ok()?)))
            .collect();
        functions.sort_unstable();
        Self { dwarf, functions }
    }

    /// What is at `address`: innermost inlined function first. Empty where nothing is known.
    #[must_use]
    pub fn resolve(&self, address: u64) -> Vec<Location> {
        let mut locations = self.by_dwarf(address).unwrap_or_default();
        let outermost = locations.len().saturating_sub(1);
        for location in &mut locations[..outermost] {
            location.inlined = true;
        }
        if locations.is_empty() {
            locations.extend(self.by_symbol(address));
        }
        locations
    }

    fn by_dwarf(&self, address: u64) -> Option<Vec<Location>> {
        let LookupResult::Output(Ok(mut frames)) = self.dwarf.as_ref()?.find_frames(address) else {
            return None;
        };
        let mut locations = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let name = frame
                .function
                .as_ref()
                .and_then(|name| name.demangle().ok());
            let Some(function) = name.map(Cow::into_owned) else {
                continue;
            };
            locations.push(Location {
                function,
                file: frame
                    .location
                    .as_ref()
                    .and_then(|location| location.file)
                    .map(|file| relative(file).to_owned()),
                line: frame.location.as_ref().and_then(|location| location.line),
                inlined: false,
            });
        }
        Some(locations)
    }

    fn by_symbol(&self, address: u64) -> Option<Location> {
        let at = self
            .functions
            .partition_point(|(first, ..)| *first <= address);
        let (first, bytes, name) = *self.functions.get(at.checked_sub(1)?)?;
        let offset = address - first;
        // Assembly often leaves the size out.
        (bytes == 0 || offset < bytes).then(|| Location {
            function: format!("{:#}+{offset:#x}", rustc_demangle::demangle(name)),
            file: None,
            line: None,
            inlined: false,
        })
    }
}

/// `file` without what tells only where it was built.
fn relative(file: &str) -> &str {
    const MANIFEST: &str = env!("CARGO_MANIFEST_DIR");
    let root = MANIFEST.rsplit_once('/').map_or(MANIFEST, |(root, _)| root);
    if let Some(file) = file.strip_prefix(root) {
        file.trim_start_matches('/')
    } else if file.starts_with("/rustc/") {
        file.split_once("/library/").map_or(file, |(_, file)| file)
    } else {
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn landmark(x: u64) -> u64 {
        std::hint::black_box(x + 1)
    }

    #[test]
    fn a_function_of_this_test_is_found_with_its_line() {
        assert_eq!(landmark(1), 2);
        let elf = std::fs::read("/proc/self/exe").unwrap();
        let symbols = Symbols::of(&elf);
        let (address, ..) = *symbols
            .functions
            .iter()
            .find(|(.., name)| name.contains("symbols") && name.contains("landmark"))
            .expect("the test binary has symbols");
        let locations = symbols.resolve(address);
        let location = locations.last().expect("resolved");
        assert!(location.function.contains("landmark"), "{location:?}");
        assert!(
            location
                .file
                .as_deref()
                .unwrap_or("")
                .ends_with("symbols.rs")
        );
        assert!(location.line.is_some());
        assert!(!location.inlined);
    }

    #[test]
    fn files_are_told_from_the_root_of_their_sources() {
        let own = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs");
        assert_eq!(relative(own), "vmm/src/lib.rs");
        let core = "/rustc/59807616/library/core/src/hint.rs";
        assert_eq!(relative(core), "core/src/hint.rs");
        assert_eq!(relative("/elsewhere/main.rs"), "/elsewhere/main.rs");
    }

    #[test]
    fn what_is_not_known_resolves_to_nothing() {
        assert_eq!(Symbols::of(b"no ELF").resolve(0x1000), []);
        let kernel = crate::boot::testing::kernel(&[0xf4]);
        assert_eq!(Symbols::of(&kernel).resolve(0x1000), []);
    }
}
