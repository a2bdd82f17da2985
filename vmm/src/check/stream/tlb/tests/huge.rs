//! The size of a page changes (T-12), and a table is emptied after it was unlinked.

use super::*;

const REGION: u64 = PAGE & !(HUGE_PAGE_SIZE - 1);

fn small() -> u64 {
    Pte::new(TABLES[3], TABLE).0
}
fn large() -> u64 {
    Pte::new(BLOCK, RW | PteFlags::HUGE).0
}
fn upper(old: u64, new: u64) -> Seen {
    seen(0, EventKind::PteChange, [1, REGION, 2, old, new])
}
fn flushed() -> [Seen; 2] {
    [invlpg(0), invlpg(1)]
}

/// What a split is found to be.
fn split(between: &[Seen]) -> Vec<&'static str> {
    let collapse = [&[upper(small(), 0)][..], &flushed(), &[pte(rw(), 0)]].concat();
    let mapped = [&collapse[..], &[upper(0, large())]].concat();
    let invalid = large() & !1;
    let begin = [upper(large(), invalid)];
    let fill = [pte(0, rw()), upper(invalid, small())];
    ids(&[&mapped[..], &begin, between, &fill].concat())
}

#[test]
fn a_page_held_in_the_size_that_it_had_is_t_12() {
    assert_eq!(split(&flushed()), [""; 0]);
    assert_eq!(split(&[invlpg(0)]), ["T-12"], "vCPU 1 did not flush");
    assert_eq!(split(&[]), ["T-12"]);
    // Who runs no user code may flush later.
    let lazy = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    assert_eq!(split(&[lazy, invlpg(0)]), [""; 0]);
    // The other way round: small ones are held when 2 MiB are mapped.
    let collapse = |flush: &[Seen]| {
        let begin = [upper(small(), 0)];
        let rest = [pte(rw(), 0), upper(0, large())];
        ids(&[&begin[..], flush, &rest].concat())
    };
    assert_eq!(collapse(&flushed()), [""; 0]);
    assert_eq!(collapse(&[invlpg(0)]), ["T-12"]);
}

/// What is cleared in a table that nothing refers to is cleared in that table: its frames may be freed, and it may serve
/// another address.
#[test]
fn a_table_is_emptied_after_it_was_unlinked() {
    let begin = [&[upper(small(), 0)][..], &flushed()].concat();
    let anon = || free(FrameKind::Anon, FRAME);
    assert_eq!(
        ids(&[&begin[..], &[pte(rw(), 0), anon()]].concat()),
        [""; 0]
    );
    assert_eq!(ids(&[&begin[..], &[anon()]].concat()), ["T-02"]);
    let elsewhere = REGION + HUGE_PAGE_SIZE;
    let fill = seen(0, EventKind::PteChange, [1, elsewhere, 1, 0, rw()]);
    let link = seen(0, EventKind::PteChange, [1, elsewhere, 2, 0, small()]);
    let clear = seen(0, EventKind::PteChange, [1, elsewhere, 1, rw(), 0]);
    let moved = [pte(rw(), 0), fill, link, clear];
    assert_eq!(ids(&[&begin[..], &moved].concat()), [""; 0]);
}
