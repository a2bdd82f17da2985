//! S-30 and on: pages of files on the disk, dirty and clean, and what is under way with them.

use abi::objects::{FrameKind, folio_flags, folio_state};

use super::pagetable::at_leaf;
use super::render::flags_of;
use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::{FileView, FolioView};
use abi::pte::PteFlags;

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "S-30",
        family: Family::NonPresent,
        predicate: "an entry that is writable or dirty, of a page of a file on the disk, is one of a dirty page",
        applies: Applies::Always,
        source: "Linux mm/vma.c, vma_wants_writenotify; mm/page-writeback.c, folio_clear_dirty_for_io",
        run: written_is_dirty,
    },
    Invariant {
        id: "S-31",
        family: Family::NonPresent,
        predicate: "a page of a file on the disk was read or not, is dirty and written only once it was, read only before; one in memory knows of no disk",
        applies: Applies::AllAtPoints,
        source: "Linux mm/filemap.c, filemap_read_folio; abi::objects::folio_state",
        run: states_agree,
    },
    Invariant {
        id: "S-32",
        family: Family::NonPresent,
        predicate: "a page of a file that is being moved has one request to the disk, and every request for one moves it",
        applies: Applies::AllAtPoints,
        source: "Linux mm/filemap.c, folio_end_writeback and folio_end_read; abi::objects::SwapArea::requests",
        run: requests_agree,
    },
];

/// The file on the disk that the folio is a page of, and is not about to leave.
pub(super) fn disk_file<'a>(context: &Context<'a>, folio: &FolioView) -> Option<&'a FileView> {
    let of_file = folio.is(FrameKind::File).then_some(folio.owner)?;
    context
        .snapshot
        .files
        .get(&of_file)
        .filter(|file| file.on_disk)
}

fn written_is_dirty(context: &Context<'_>, findings: &mut Findings) {
    let written = PteFlags::WRITE | PteFlags::DIRTY;
    for space in &context.spaces {
        for leaf in space.user.leaves.iter() {
            let folio = context.folio_of(leaf);
            let Some(folio) = folio.filter(|folio| disk_file(context, folio).is_some()) else {
                continue;
            };
            let is_written = leaf.entry.flags().intersects(written);
            let is_dirty = folio.state & folio_state::DIRTY != 0;
            findings.require(is_dirty || !is_written, || {
                at_leaf(
                    context,
                    space,
                    leaf,
                    "a clean page of a file can be written without a fault: nobody would write it back",
                )
                .expected("W and D clear, or a dirty page")
                .found(format!(
                    "{} of a page with state {:#x}",
                    flags_of(leaf.entry, leaf.level),
                    folio.state
                ))
                .frame(folio.frame)
                .details(context.describe_mappings(folio.frame))
            });
        }
    }
}

fn states_agree(context: &Context<'_>, findings: &mut Findings) {
    const UPTODATE: u8 = folio_state::UPTODATE;
    const NEEDS_CONTENTS: u8 = folio_state::DIRTY | folio_state::WRITEBACK;
    /// What the LRU lists know of it.
    const LISTED: u8 =
        folio_state::LRU | folio_state::ACTIVE | folio_state::REFERENCED | folio_state::UNEVICTABLE;
    let pages = context.snapshot.folios.iter();
    for folio in pages.filter(|folio| folio.is(FrameKind::File)) {
        let Some(file) = context.snapshot.files.get(&folio.owner) else {
            continue;
        };
        let (state, fresh) = (folio.state, folio.flags & folio_flags::FRESH != 0);
        let right = if file.on_disk {
            (context.snapshot.swap.is_on() || state & LISTED == 0)
                && fresh == (state & UPTODATE == 0)
                && !(fresh && state & NEEDS_CONTENTS != 0)
                && (fresh || state & folio_state::READING == 0)
        } else {
            state == 0
        };
        findings.require(right, || {
            Finding::new("what is known of a page of a file contradicts itself")
                .expected(if file.on_disk {
                    "FRESH, being read or not; or UPTODATE, and then perhaps DIRTY or WRITEBACK"
                } else {
                    "no state: the file is in memory"
                })
                .found(format!(
                    "{}state {state:#x}",
                    if fresh { "FRESH, " } else { "" }
                ))
                .frame(folio.frame)
                .object("File", file.gpa)
        });
    }
}

fn requests_agree(context: &Context<'_>, findings: &mut Findings) {
    const MOVING: u8 = folio_state::WRITEBACK | folio_state::READING;
    let moving = &context.snapshot.swap.moving;
    let pages = context.snapshot.folios.iter();
    for folio in pages.filter(|folio| disk_file(context, folio).is_some()) {
        let requests = moving.iter().filter(|gpa| **gpa == folio.gpa()).count();
        let expected = usize::from(folio.state & MOVING != 0);
        findings.require(requests == expected, || {
            Finding::new("a page of a file and the requests to the disk disagree")
                .expected(format!("{expected} requests: state {:#x}", folio.state))
                .found(format!("{requests}"))
                .frame(folio.frame)
        });
    }
}
