//! The part of the audit that is about pages of files on the disk: what is clean is what the disk holds.

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{File, FrameKind, Pa, folio_flags, folio_state};
use abi::pte::{Pte, PteFlags};

use super::TestKernel;
use super::audit::Found;
use crate::Kernel;
use crate::arch::Arch;
use crate::mm::{Field, Slot};

/// No transfer is under way.
pub(super) fn audit_disk_pages<A: Arch>(kernel: &Kernel<A>, found: &Found) {
    for frame in 1..kernel.root().nr_frames.get() {
        let folio = kernel.frame_folio(frame);
        if folio.kind.get() != FrameKind::File as u8 {
            continue;
        }
        let of_lists = folio_state::LRU
            | folio_state::ACTIVE
            | folio_state::REFERENCED
            | folio_state::UNEVICTABLE;
        let state = folio.state.get() & !of_lists;
        if !kernel.file_on_disk(Pa::<File>::new(folio.owner.get())) {
            assert_eq!(state, 0, "a page of a file in memory knows of the disk");
            continue;
        }
        let (dirty, read) = (folio_state::DIRTY, folio_state::UPTODATE);
        assert_eq!(state & !(dirty | read), 0, "frame {frame:#x}");
        let fresh = folio.flags.get() & folio_flags::FRESH != 0;
        assert_ne!(fresh, state & read != 0, "frame {frame:#x}");
        assert!(!fresh || state & dirty == 0);
        let mappings = found.mapped.get(&(frame << PAGE_SHIFT));
        for &(mm, gva) in mappings.into_iter().flatten() {
            let entry = entry_of(kernel, mm, gva).flags();
            let written = entry.intersects(PteFlags::WRITE | PteFlags::DIRTY);
            assert!(
                !written || state & dirty != 0,
                "frame {frame:#x} is clean, its entry for {gva:#x} {entry:?}"
            );
        }
    }
}

fn entry_of<A: Arch>(kernel: &Kernel<A>, mm: u64, gva: u64) -> Pte {
    let table = kernel.leaf_table(kernel.obj(Pa::new(mm)), gva).unwrap();
    kernel.read_pte(Slot::new(table, 1, gva))
}

/// A page that is clean, and that no device writes, is as the disk has it.
pub(super) fn audit_contents(kernel: &TestKernel) {
    let mut disk = kernel.arch.disk();
    for frame in 1..kernel.root().nr_frames.get() {
        let folio = kernel.frame_folio(frame);
        let gpa = frame << PAGE_SHIFT;
        let clean = folio.state.get() & folio_state::DIRTY == 0;
        if kernel.is_disk_page(gpa) && clean && folio.pins.get() == 0 {
            let mut holds = [0; PAGE_SIZE as usize];
            kernel.load_memory(gpa, &mut holds);
            let sector = kernel.page_sector(gpa);
            assert!(
                *disk.page(sector) == holds,
                "frame {frame:#x} is clean, and not what the disk has at sector {sector}"
            );
        }
    }
}
