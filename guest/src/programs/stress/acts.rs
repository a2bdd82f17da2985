//! What threads do.

use abi::channel::ReportKind::WrongResult;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::syscall::{Errno, advice, encode, map, mremap, prot};

use super::SUBJECT_GVA;
use super::words::{MAX_TAKEN, Owner, place};
use crate::sys::{ANONYMOUS, Sys};
use crate::team::Findings;

/// One kind of act.
#[derive(Clone, Copy)]
enum Act {
    /// Writes and reads some pages.
    Access,
    /// Maps fresh pages in the place of others.
    Replace,
    /// Leaves a hole for a while.
    Unmap,
    /// Takes the right to write away for a while.
    Protect,
    /// Gives advice: drops pages, or asks that they be reclaimed. Not MADV_FREE: a page that it was given for may be
    /// dropped at any later time, also while its new owner watches it.
    Advise(u64),
    /// Has frames reclaimed, whosever they are.
    Reclaim,
    /// Has pages moved to other frames.
    Migrate,
    /// Has pages brought together in a folio of 2 MiB, where the region has so many.
    Collapse,
    /// Moves pages to another place of the region.
    Move,
    /// Moves pages out of the region, watches them, and brings them back.
    Take,
    /// Maps pages that nobody else knows, which have the frames of others before long.
    Reuse,
    /// Forks; the child watches its copy.
    Fork,
    /// Writes to a file on the disk, syncs it, drops its pages, or has them reclaimed.
    File,
}

/// Acts, and how often they are drawn.
const ACTS: &[(Act, u64)] = &[
    (Act::Access, 40),
    (Act::Replace, 6),
    (Act::Unmap, 6),
    (Act::Protect, 8),
    (Act::Advise(advice::DONTNEED), 6),
    (Act::Advise(advice::PAGEOUT), 3),
    (Act::Advise(advice::COLD), 2),
    (Act::Advise(advice::POPULATE_WRITE), 2),
    (Act::Reclaim, 3),
    (Act::Migrate, 4),
    (Act::Collapse, 3),
    (Act::Move, 8),
    (Act::Take, 8),
    (Act::Reuse, 6),
    (Act::Fork, 3),
    (Act::File, 8),
];

/// Pages of a folio of 2 MiB.
const HUGE_PAGES: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;
const RW: u64 = prot::READ | prot::WRITE;
const MOVE: u64 = mremap::MAYMOVE | mremap::FIXED;
/// Where thread `i` takes pages, so far apart.
const HIDEOUT: u64 = SUBJECT_GVA + (1 << 32);
const APART: u64 = 1 << 24;

/// Some pages of the region.
#[derive(Clone, Copy)]
struct Part {
    first: u64,
    pages: u64,
}

impl Part {
    fn start(self) -> u64 {
        place(self.first)
    }
    fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

impl<S: Sys> Owner<'_, S> {
    /// All its acts.
    pub(super) fn act_all(&mut self) {
        for round in 1..=self.shared.rounds {
            self.act();
            self.shared.pace.pass(self.sys, round);
            if self.shared.findings.enough() {
                return;
            }
        }
    }

    fn act(&mut self) {
        let all = ACTS.iter().map(|(_, weight)| weight).sum();
        let mut left = self.draw(all);
        for (act, weight) in ACTS {
            if left < *weight {
                return self.perform(*act);
            }
            left -= weight;
        }
    }

    fn perform(&mut self, act: Act) {
        let part = self.part();
        match act {
            Act::Access => self.access(part),
            Act::Replace => self.fill(part),
            Act::Unmap => {
                let unmapped = self.sys.munmap(part.start(), part.bytes());
                self.expect(unmapped, &[]);
                self.access(part);
                self.fill(part);
            }
            Act::Protect => {
                for protection in [prot::READ, RW] {
                    let (start, bytes) = (part.start(), part.bytes());
                    let protected = self.sys.mprotect(start, bytes, protection);
                    self.expect(protected, &[Errno::ENOMEM]);
                    self.access(part);
                }
            }
            Act::Advise(advice) => {
                let advised = self.sys.madvise(part.start(), part.bytes(), advice);
                // To populate what another thread protects or unmaps just now is refused, or a fault (Linux's
                // madvise_populate).
                let legal = match advice {
                    advice::POPULATE_WRITE => &[Errno::ENOMEM, Errno::EFAULT, Errno::EINVAL][..],
                    _ => &[Errno::ENOMEM],
                };
                self.expect(advised, legal);
            }
            Act::Reclaim => {
                self.sys.reclaim(part.pages);
            }
            Act::Migrate => {
                let migrated = self.sys.migrate(part.start(), part.bytes());
                self.expect(migrated, &[Errno::ENOSYS, Errno::ENOMEM]);
                self.access(part);
            }
            Act::Collapse => self.collapse(part),
            Act::Move => self.relocate(part),
            Act::Take => self.take(part),
            Act::Reuse => self.reuse(part.pages),
            Act::Fork => self.fork(part),
            Act::File => self.use_file(),
        }
    }

    /// At most [`MAX_TAKEN`] pages, anywhere.
    fn part(&mut self) -> Part {
        let first = self.draw(self.shared.pages);
        let most = MAX_TAKEN.min(self.shared.pages - first);
        let pages = 1 + self.draw(most);
        Part { first, pages }
    }

    pub(super) fn expect(&self, result: Result<u64, Errno>, legal: &[Errno]) -> bool {
        if let Err(errno) = result
            && !legal.contains(&errno)
        {
            let findings = &self.shared.findings;
            findings.report(self.sys, WrongResult, 0, 0, encode(Err(errno)));
        }
        result.is_ok()
    }

    fn access(&mut self, part: Part) {
        for page in part.first..part.first + part.pages {
            if self.draw(2) == 0 {
                self.write(page);
            }
            self.read(page);
        }
    }

    fn fill(&mut self, part: Part) {
        let flags = ANONYMOUS | map::FIXED;
        let mapped = self.sys.mmap(part.start(), part.bytes(), RW, flags);
        self.expect(mapped, &[]);
    }

    fn relocate(&mut self, part: Part) {
        let to = self.draw(self.shared.pages - part.pages + 1);
        // Linux refuses places that overlap.
        if to < part.first + part.pages && part.first < to + part.pages {
            return self.access(part);
        }
        let sizes = (part.bytes(), part.bytes());
        let moved = self.sys.mremap(part.start(), sizes, MOVE, place(to));
        self.expect(moved, &[Errno::EFAULT]);
        self.fill(part);
        self.access(Part { first: to, ..part });
    }

    fn collapse(&mut self, part: Part) {
        let first = part.first / HUGE_PAGES * HUGE_PAGES;
        if first + HUGE_PAGES > self.shared.pages {
            return self.access(part);
        }
        let collapsed = self
            .sys
            .madvise(place(first), HUGE_PAGE_SIZE, advice::COLLAPSE);
        // Holes, several VMAs, pages that others use just now, memory without a block of 2 MiB.
        let legal = [Errno::ENOMEM, Errno::EINVAL, Errno::EAGAIN, Errno::EBUSY];
        self.expect(collapsed, &legal);
        self.access(part);
    }

    fn take(&mut self, part: Part) {
        let hideout = HIDEOUT + self.index as u64 * APART;
        let sizes = (part.bytes(), part.bytes());
        let taken = self.sys.mremap(part.start(), sizes, MOVE, hideout);
        self.fill(part);
        if self.expect(taken, &[Errno::EFAULT]) {
            let shared = self.shared;
            self.watch(&shared.findings, hideout, part.pages);
            // Others may have made holes of what was taken.
            let back = self.sys.mremap(hideout, sizes, MOVE, part.start());
            self.expect(back, &[Errno::EFAULT]);
        }
        // What could not be taken at once was taken in part.
        let left = self.sys.munmap(hideout, part.bytes());
        self.expect(left, &[]);
        self.fill(part);
    }

    fn reuse(&mut self, pages: u64) {
        let mapped = self.sys.mmap_anonymous(pages * PAGE_SIZE);
        if self.expect(mapped, &[])
            && let Ok(base) = mapped
        {
            self.stamp(base, pages);
            let unmapped = self.sys.munmap(base, pages * PAGE_SIZE);
            self.expect(unmapped, &[]);
        }
    }

    fn fork(&mut self, part: Part) {
        let (shared, index) = (self.shared, self.index);
        let child = self.sys.fork(|sys| {
            let findings = Findings::default();
            Owner::forked(sys, shared, index).watch(&findings, part.start(), part.pages);
            findings.status()
        });
        match child {
            Ok(pid) => shared.findings.reap(self.sys, pid),
            Err(errno) => {
                self.expect(Err(errno), &[]);
            }
        }
    }
}
