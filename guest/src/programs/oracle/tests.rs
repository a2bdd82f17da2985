use abi::oracle::{
    ARENA, Arg, Case as Head, Header, MAGIC, Mode, Op, OpKind, Residency, Returns, Span, looked_at,
};
use abi::syscall::{Errno, encode, map, nr, prot};
use zerocopy::IntoBytes;

use super::Sink;
use super::blob::Blob;
use super::words::FAULT;
use crate::native::oracle::Linux;
use crate::sys::ANONYMOUS;

const PAGE: u64 = 4096;
const RW: u64 = prot::READ | prot::WRITE;

fn arena(page: u64) -> Arg {
    Arg {
        mode: Mode::Arena as u32,
        index: 0,
        value: page * PAGE,
    }
}

fn raw(value: u64) -> Arg {
    Arg {
        mode: Mode::Raw as u32,
        index: 0,
        value,
    }
}

fn op(kind: OpKind, args: &[Arg]) -> Op {
    let mut op = Op {
        kind: kind as u32,
        ..Op::default()
    };
    op.args[..args.len()].copy_from_slice(args);
    op
}

fn call(number: u64, args: &[Arg]) -> Op {
    Op {
        nr: number as u32,
        ..op(OpKind::Call, args)
    }
}

fn map_fixed(page: u64, pages: u64) -> Op {
    let flags = raw(ANONYMOUS | map::FIXED);
    let args = [
        arena(page),
        raw(pages * PAGE),
        raw(RW),
        flags,
        raw(u64::MAX),
    ];
    Op {
        returns: Returns::Place as u32,
        ..call(nr::MMAP, &args)
    }
}

/// A VMA of the arena: first page, last page, flags.
type Area = (u64, u64, u64);
/// What is seen of its first piece: the pages in memory, those that are read, what is in these.
type Seen = (u64, u64, Vec<u64>);

/// A step: its result, and the map of the arena.
type Shown = (Vec<u64>, Vec<(Area, Seen)>);

/// What each step shows on Linux.
fn record_all(ops: &[Op]) -> Vec<Shown> {
    let mut linux = Linux::start().unwrap();
    let cases = [ops];
    let shown = linux.run(&cases).unwrap();
    let steps = shown.map(|shown| {
        let (result, mut rest) = shown.words[1..].split_at(shown.words[0] as usize);
        let page = |address: u64| (address & !(PAGE - 1)).wrapping_sub(ARENA) / PAGE;
        let mut areas = Vec::new();
        while let [start, end, behind @ ..] = rest {
            rest = behind;
            let mut pieces = Vec::new();
            for _ in looked_at(*start, end & !(PAGE - 1)) {
                let (contents, behind) = rest[2..].split_at(rest[1].count_ones() as usize);
                pieces.push((rest[0], rest[1], contents.to_vec()));
                rest = behind;
            }
            if page(*start) < 1 << 20 {
                areas.push(((page(*start), page(*end), end % PAGE), pieces.remove(0)));
            }
        }
        (result.to_vec(), areas)
    });
    steps.collect()
}

/// That without the pages.
fn record(ops: &[Op]) -> Vec<(Vec<u64>, Vec<Area>)> {
    let steps = record_all(ops).into_iter();
    let maps = steps.map(|(result, areas)| (result, areas.into_iter().map(|it| it.0).collect()));
    maps.collect()
}

#[test]
fn linux_shows_results_accesses_and_the_map_after_every_step() {
    let refused = encode(Err(Errno::ENOMEM));
    let fork = Op {
        body: 2,
        ..op(OpKind::Fork, &[])
    };
    let steps = record(&[
        map_fixed(0, 3),
        op(OpKind::Store, &[arena(1), raw(7)]),
        call(nr::MPROTECT, &[arena(1), raw(PAGE), raw(prot::READ)]),
        op(OpKind::Store, &[arena(1), raw(8)]),
        fork,
        call(nr::MUNMAP, &[arena(0), raw(3 * PAGE)]),
        op(OpKind::Load, &[arena(1)]),
        op(OpKind::Check, &[arena(0), raw(4)]),
        call(nr::MPROTECT, &[arena(9), raw(PAGE), raw(RW)]),
        op(OpKind::Contents, &[]),
    ]);
    let split = vec![(0, 1, RW), (1, 2, prot::READ), (2, 3, RW)];
    let expected = [
        (vec![ARENA], vec![(0, 3, RW)]),
        (vec![0], vec![(0, 3, RW)]),
        (vec![0], split.clone()),
        (vec![FAULT], split.clone()),
        // The child's are first.
        (vec![0], vec![]),
        (vec![FAULT], vec![]),
        (vec![0], split.clone()),
        (vec![0, 7, 0, FAULT], split.clone()),
        (vec![refused], split.clone()),
        (vec![ARENA + PAGE, 7], split),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn linux_shows_the_pages_in_memory_and_their_contents_and_the_look_leaves_them() {
    let fork = Op {
        body: 1,
        ..op(OpKind::Fork, &[])
    };
    let inside = |page: u64, byte: u64| Arg {
        value: page * PAGE + byte,
        ..arena(0)
    };
    let store = |place: Arg, value: u64| op(OpKind::Store, &[place, raw(value)]);
    let steps = record_all(&[
        map_fixed(0, 3),
        store(arena(1), 7),
        store(inside(1, PAGE / 2), 9),
        op(OpKind::Load, &[arena(2)]),
        fork,
        store(inside(2, PAGE - 8), 5),
        call(nr::MPROTECT, &[arena(0), raw(3 * PAGE), raw(prot::NONE)]),
        call(nr::MUNMAP, &[arena(0), raw(2 * PAGE)]),
    ]);
    let seen: Vec<Seen> = steps
        .into_iter()
        .map(|mut step| step.1.remove(0).1)
        .collect();
    let both = 9 << 32 | 7;
    let expected = [
        (0, 0, vec![]),
        (0b010, 0b010, vec![7]),
        (0b010, 0b010, vec![both]),
        (0b110, 0b110, vec![both, 0]),
        // The child's first.
        (0b110, 0b110, vec![both, 5 << 48]),
        (0b110, 0b110, vec![both, 0]),
        // What cannot be read is in memory all the same.
        (0b110, 0, vec![]),
        (0b1, 0, vec![]),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn a_guest_says_what_it_has_in_memory_where_that_is_compared() {
    let (on_linux, mapped, here) = (0b0110, 0b0010, 0b0101);
    let said = |residency| {
        let spans = [Span { start: 0, len: 4 }];
        let blob = blob_with(
            &[map_fixed(0, 1)],
            &spans,
            &[1, 9, on_linux, mapped],
            residency,
        );
        let case = Blob::parse(&blob).unwrap().cases().next().unwrap();
        let compare = super::Compare { number: 0, case };
        let pages = Sink::<crate::native::Native>::pages(&compare, 0, 0, (ARENA, 4), here);
        (pages.resident, pages.mapped, pages.elsewhere)
    };
    assert_eq!(said(Residency::Same), (here, mapped, 0));
    assert_eq!(said(Residency::Open), (on_linux, mapped, mapped));
}

#[test]
fn places_are_found_from_one_address_down_whatever_the_process_has() {
    let anywhere = |pages: u64| {
        let flags = raw(ANONYMOUS);
        let args = [
            raw(0),
            raw(pages * PAGE),
            raw(prot::NONE),
            flags,
            raw(u64::MAX),
        ];
        call(nr::MMAP, &args)
    };
    let heap = |bytes: u64| {
        let end = Arg {
            mode: Mode::Heap as u32,
            index: 0,
            value: bytes,
        };
        call(nr::BRK, &[end])
    };
    let results: Vec<u64> = record(&[anywhere(1), anywhere(3), heap(0), heap(PAGE + 1)])
        .iter()
        .map(|(result, _)| result[0])
        .collect();
    use abi::oracle::{HEAP, TOP};
    assert_eq!(results, [TOP - PAGE, TOP - 4 * PAGE, HEAP, HEAP + PAGE + 1]);
}

fn blob(ops: &[Op], spans: &[Span], words: &[u64]) -> Vec<u8> {
    blob_with(ops, spans, words, Residency::Same)
}

fn blob_with(ops: &[Op], spans: &[Span], words: &[u64], residency: Residency) -> Vec<u8> {
    let head = Header {
        magic: MAGIC,
        cases: 1,
    };
    let case = Head {
        ops: ops.len() as u32,
        words: words.len() as u32,
        residency: residency as u32,
        reserved: 0,
    };
    [
        head.as_bytes(),
        case.as_bytes(),
        ops.as_bytes(),
        spans.as_bytes(),
        words.as_bytes(),
    ]
    .concat()
}

#[test]
fn an_observation_is_as_expected_only_if_every_word_is() {
    let spans = [Span { start: 1, len: 2 }];
    let blob = blob(&[map_fixed(0, 1)], &spans, &[9, 5, 6]);
    let case = Blob::parse(&blob).unwrap().cases().next().unwrap();
    assert!(case.expects(0, &[5, 6]));
    for other in [&[][..], &[5], &[5, 7], &[9, 5], &[5, 6, 0]] {
        assert!(!case.expects(0, other), "{other:?}");
    }
}

#[test]
fn malformed_blobs_are_refused() {
    let reason = |blob: &[u8]| Blob::parse(blob).err();
    let one = |op: Op, span| blob(&[op], &[span], &[0]);
    let span = Span { start: 0, len: 1 };
    let good = one(map_fixed(0, 1), span);
    assert_eq!(reason(&good), None);
    assert_eq!(reason(&good[..8]), Some("is shorter than its header"));
    assert_eq!(reason(&good[..good.len() - 1]), Some("is cut short"));
    let mut bad = good.clone();
    bad[0] ^= 1;
    assert_eq!(reason(&bad), Some("is not a list of cases"));
    let malformed = Some("has a malformed case");
    let mut bad = good.clone();
    bad[size_of::<Header>() + 8] = 77;
    assert_eq!(reason(&bad), malformed);
    let mut unknown = map_fixed(0, 1);
    unknown.kind = 77;
    assert_eq!(reason(&one(unknown, span)), malformed);
    let mut unknown = map_fixed(0, 1);
    unknown.args[2].mode = 77;
    assert_eq!(reason(&one(unknown, span)), malformed);
    let far = Span { start: 1, len: 1 };
    assert_eq!(reason(&one(map_fixed(0, 1), far)), malformed);
    // A body that reaches beyond the case, or beyond the fork that it is in; too many forks in each other.
    let fork = |body| Op {
        body,
        ..op(OpKind::Fork, &[])
    };
    let forks = |bodies: &[u32]| {
        let ops: Vec<Op> = bodies.iter().map(|body| fork(*body)).collect();
        blob(&ops, &vec![span; ops.len()], &[0])
    };
    assert_eq!(reason(&forks(&[1])), malformed);
    assert_eq!(reason(&forks(&[1, 1, 0])), malformed);
    assert_eq!(reason(&forks(&[2, 1, 0])), None);
    assert_eq!(reason(&forks(&[4, 3, 2, 1, 0])), None);
    assert_eq!(reason(&forks(&[5, 4, 3, 2, 1, 0])), malformed);
}
