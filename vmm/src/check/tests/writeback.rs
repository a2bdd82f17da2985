use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SHIFT;
use abi::objects::{File, FrameKind, folio_flags, folio_state};
use abi::pte::PteFlags;

use crate::check::world::{PRIVATE_FILE, SHARED_FILE, World};

/// Requires exactly `ids` to be violated in a guest whose file is on the disk, all of its pages read and dirty, that
/// `corrupt` has broken.
fn fires(ids: &[&str], corrupt: impl FnOnce(&World)) {
    super::fires(ids, |world| {
        world.update::<File, _>(world.file, |file| file.on_disk.store(1, Relaxed));
        let frames = world.root(|root| root.nr_frames.load(Relaxed));
        for frame in 1..frames {
            world.folio(frame, |folio| {
                if folio.kind.load(Relaxed) == FrameKind::File as u8 {
                    let state = folio_state::UPTODATE | folio_state::DIRTY;
                    folio.state.store(state, Relaxed);
                }
            });
        }
        corrupt(world);
    });
}

/// The page that both processes map, and the parent twice.
fn page(world: &World) -> u64 {
    world.mapped_frame(world.parent, SHARED_FILE)
}

#[test]
fn a_file_on_the_disk_is_clean() {
    fires(&[], |_| {});
    // Write-back is under way, and has taken the right to write away.
    fires(&[], |world| {
        for mm in [world.parent, world.child] {
            world.change_pte(mm, SHARED_FILE, 1, |pte| {
                pte.without(PteFlags::WRITE | PteFlags::DIRTY)
            });
        }
        world.change_pte(world.parent, PRIVATE_FILE, 1, |pte| {
            pte.without(PteFlags::DIRTY)
        });
        let frame = page(world);
        world.folio(frame, |folio| {
            let state = folio_state::UPTODATE | folio_state::WRITEBACK;
            folio.state.store(state, Relaxed);
        });
        world.root(|root| {
            root.swap.requests[0]
                .folio
                .store(frame << PAGE_SHIFT, Relaxed);
        });
    });
}

#[test]
fn s30_a_page_is_clean_and_its_entries_writable() {
    fires(&["S-30"], |world| {
        world.folio(page(world), |folio| {
            folio.state.fetch_and(!folio_state::DIRTY, Relaxed)
        });
    });
}

#[test]
fn s31_a_page_that_was_not_read_is_dirty() {
    fires(&["S-31"], |world| {
        world.folio(page(world), |folio| {
            folio.flags.fetch_or(folio_flags::FRESH, Relaxed)
        });
    });
}

#[test]
fn s31_a_page_of_a_file_in_memory_is_dirty() {
    super::fires(&["S-31"], |world| {
        world.folio(page(world), |folio| {
            folio.state.store(folio_state::DIRTY, Relaxed);
        });
    });
}

#[test]
fn s32_a_page_is_being_written_and_nobody_has_asked() {
    fires(&["S-32"], |world| {
        world.folio(page(world), |folio| {
            folio.state.fetch_or(folio_state::WRITEBACK, Relaxed)
        });
    });
}

#[test]
fn s32_the_disk_moves_a_page_that_does_not_know() {
    fires(&["S-32"], |world| {
        let frame = page(world);
        world.root(|root| {
            root.swap.requests[3]
                .folio
                .store(frame << PAGE_SHIFT, Relaxed);
        });
    });
}
