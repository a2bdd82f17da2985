//! Speed of the host's page-table walk, in PTE slots: whole mms, full and sparse, and single
//! translations. The figure to reach is 50 million slots a second.

use std::hint::black_box;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::pte::{Pte, PteFlags, index};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmm::inspect::MemoryImage;
use vmm::inspect::walk::{AddressSpace, USER_HALF, Visitor, translate, visit};

const CR3: u64 = 0x1000;
const TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::USER);

/// An mm with `tables` level-1 tables side by side, in which every `spacing`th page is present.
fn mm(tables: u64, spacing: usize) -> MemoryImage {
    let memory = MemoryImage::new((tables + tables / 512 + 8) * PAGE_SIZE);
    let set = |gpa: u64, entry: Pte| memory.word(gpa).expect("in memory").store(entry.0, Relaxed);
    let mut next = CR3 + PAGE_SIZE;
    for table in 0..tables {
        let gva = table << 21;
        let mut at = CR3;
        for level in [4, 3, 2] {
            let slot = at + 8 * index(gva, level) as u64;
            let mut entry = Pte(memory.word(slot).expect("in memory").load(Relaxed));
            if entry.is_none() {
                entry = Pte::new(next, TABLE);
                set(slot, entry);
                next += PAGE_SIZE;
            }
            at = entry.address();
        }
        for slot in (0..ENTRIES_PER_TABLE).step_by(spacing) {
            set(
                at + 8 * slot as u64,
                Pte::new(slot as u64 * PAGE_SIZE, TABLE),
            );
        }
    }
    memory
}

/// A visitor that looks at every leaf and keeps nothing.
#[derive(Default)]
struct Sum(u64);

impl Visitor for Sum {
    fn leaf(&mut self, leaf: vmm::inspect::walk::Leaf) {
        self.0 = self.0.wrapping_add(leaf.entry.0 ^ leaf.gva);
    }
}

fn walk(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("walk");
    for (name, spacing) in [("full", 1), ("one page in 16", 16), ("empty", usize::MAX)] {
        // 2,048 tables translate 4 GiB.
        let memory = mm(2048, spacing);
        let slots = visit(&memory, CR3, USER_HALF, &mut Sum::default()).slots;
        group.throughput(Throughput::Elements(slots));
        group.bench_function(format!("visit, {name}"), |bencher| {
            bencher.iter(|| {
                let mut sum = Sum::default();
                visit(black_box(&memory), CR3, USER_HALF, &mut sum);
                sum.0
            });
        });
        group.bench_function(format!("collect for the checkers, {name}"), |bencher| {
            bencher.iter(|| {
                AddressSpace::read(black_box(&memory), CR3, USER_HALF)
                    .leaves
                    .len()
            });
        });
    }
    let memory = mm(64, 1);
    group.throughput(Throughput::Elements(4));
    group.bench_function("translate", |bencher| {
        bencher.iter(|| translate(&memory, CR3, black_box(0x40_0000)).steps.len());
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = walk
}
criterion_main!(benches);
