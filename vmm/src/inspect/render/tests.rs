use abi::layout::{DIRECT_MAP_BASE, PAGE_SIZE};
use abi::objects::FrameKind;
use abi::pte::{Pte, PteFlags};

use super::*;
use crate::check::world::{DATA, EMPTY, TEXT, World};
use crate::inspect::walk::{KERNEL_HALF, translate};

fn pgd(world: &World, mm: u64) -> u64 {
    world.entry(mm, 0, 4)
}

fn requires_columns(text: &str) {
    for line in text.lines() {
        assert!(
            line.chars().count() <= 100,
            "wider than 100 columns: {line}"
        );
        assert_eq!(line, line.trim_end(), "blanks at the end");
    }
}

#[test]
fn the_machine_at_a_glance() {
    let world = World::new();
    let report = machine(&world.memory, &world.snapshot(), &world.vcpus);
    let text = report.to_string();
    requires_columns(&text);
    for expected in [
        "in the program",
        "idle (halted)",
        "mm 2 (lazy)",
        "00400000-00404000 r-xp",
        "READ EXEC",
        "cpumask {0}",
        "mmap_lock free",
    ] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["vcpus"][0]["rip"], "0x400000");
    assert_eq!(json["vcpus"][1]["lazy"], true);
    let parent = json["mms"]
        .as_array()
        .unwrap()
        .iter()
        .find(|mm| mm["id"] == 1)
        .unwrap();
    assert_eq!(parent["maps"][0]["resident"], 2);
    assert_eq!(parent["vmas"][0]["start"], "0x300000");
}

#[test]
fn a_tree_of_a_range() {
    let world = World::new();
    let report = tree(
        &world.memory,
        pgd(&world, world.parent),
        TEXT..=DATA + 0x1000,
    );
    let text = report.to_string();
    requires_columns(&text);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[1].starts_with("└─ L4[  0]"), "{text}");
    assert!(lines[2].starts_with("   └─ L3[  0]"), "{text}");
    assert!(lines[3].starts_with("      ├─ L2[  2]"), "{text}");
    assert!(lines[4].starts_with("      │  └─ L1[  0]"), "{text}");
    assert!(
        lines[4].ends_with("P U A  … ×2"),
        "the two text pages are folded:\n{text}"
    );
    assert!(text.contains("P U A NX COW"), "{text}");
    assert_eq!(lines.len(), 8, "{text}");
    let json = serde_json::to_value(&report).unwrap();
    let leaves = &json["entries"][0]["entries"][0]["entries"][0]["entries"];
    assert_eq!(leaves[0]["times"], 2);
    assert_eq!(leaves[0]["stride"], 4096);
}

#[test]
fn huge_leaves_and_runs_of_them() {
    let world = World::new();
    let text = tree(&world.memory, pgd(&world, 0), KERNEL_HALF).to_string();
    requires_columns(&text);
    let direct_map = text.lines().find(|line| line.contains("… ×2")).unwrap();
    assert!(direct_map.contains("0x0 … 0x200000"), "{text}");
    assert!(direct_map.contains("P W PS G NX"), "{text}");
}

#[test]
fn frames_in_reverse_order_fold_too() {
    let mut world = World::new();
    for page in 0..5 {
        let entry = world.leaf_entry(world.parent, EMPTY + page * PAGE_SIZE);
        let gpa = 0x20_0000 - page * PAGE_SIZE;
        world.set_pte(entry, Pte::new(gpa, PteFlags::PRESENT));
    }
    let text = tree(
        &world.memory,
        pgd(&world, world.parent),
        EMPTY..=EMPTY + 0xffff,
    )
    .to_string();
    assert!(
        text.contains("0x200000 … 0x1fc000  P  … ×5") || text.contains("… ×5"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 5, "{text}");
}

#[test]
fn wrong_entries_are_marked() {
    let world = World::new();
    let root = pgd(&world, world.parent);
    world.set_pte(root + 8 * 9, Pte::new(root, PteFlags::PRESENT));
    world.set_pte(root + 8 * 10, Pte::new(1 << 45, PteFlags::PRESENT));
    world.set_pte(root + 8 * 11, Pte(1 << 12));
    let text = tree(&world.memory, root, 9 << 39..=(12 << 39) - 1).to_string();
    requires_columns(&text);
    assert!(text.contains("✗ back to a table above"), "{text}");
    assert!(text.contains("✗ outside guest memory"), "{text}");
    assert!(text.contains("✗ not present, yet not zero"), "{text}");
}

#[test]
fn an_empty_range_says_so() {
    let world = World::new();
    let text = tree(&world.memory, pgd(&world, world.child), EMPTY..=EMPTY + 1).to_string();
    assert!(text.ends_with("└─ nothing is mapped here\n"), "{text}");
}

#[test]
fn a_shared_frame_with_all_who_map_it() {
    let world = World::new();
    let snapshot = world.snapshot();
    let gpa = world.mapped_frame(world.parent, DATA) * PAGE_SIZE;
    let report = frame(&world.memory, &snapshot, gpa);
    let text = report.to_string();
    requires_columns(&text);
    assert_eq!(report.mappings.len(), 3, "two mms and the direct map");
    assert_eq!(report.mappings[2].gva, DIRECT_MAP_BASE + gpa);
    assert!(text.contains("refcount 2, mapcount 2"), "{text}");
    assert!(text.contains("maps it at 0x600000"), "{text}");
    assert_eq!(report.rmap.len(), 2);
    assert!(report.rmap.iter().all(|vma| vma.mapped));
}

#[test]
fn a_frame_that_is_no_folio() {
    let world = World::new();
    let snapshot = world.snapshot();
    let table = world.frame_of_kind(FrameKind::Table) * PAGE_SIZE;
    let text = frame(&world.memory, &snapshot, table).to_string();
    assert!(
        text.contains("Table") && text.contains("mm 1, level 4"),
        "{text}"
    );
    let text = frame(&world.memory, &snapshot, 1 << 40).to_string();
    assert!(text.contains("no descriptor: outside memory"), "{text}");
}

#[test]
fn the_folio_behind_an_address() {
    let world = World::new();
    let snapshot = world.snapshot();
    let (walk, report) = folio_behind(&world.memory, &snapshot, 2, DATA + 0x1234).unwrap();
    assert_eq!(
        report.unwrap().frame,
        world.mapped_frame(world.child, DATA + 0x1000)
    );
    let text = walk.to_string();
    requires_columns(&text);
    assert!(
        text.ends_with("(4 KiB page; CPL 3 may read, write)"),
        "{text}"
    );
    let (walk, report) = folio_behind(&world.memory, &snapshot, 2, TEXT).unwrap();
    assert!(report.is_none() && walk.to_string().ends_with("= not present at level 2"));
    assert!(folio_behind(&world.memory, &snapshot, 7, TEXT).is_none());
}

#[test]
fn a_violation_for_a_person() {
    let world = World::new();
    world.change_pte(world.parent, TEXT, 1, |pte| pte.with(PteFlags::WRITE));
    let text = world.judge().to_string();
    requires_columns(&text);
    assert!(
        text.starts_with("✗ P-02  an entry permits writes, its VMA does not\n"),
        "{text}"
    );
    assert!(
        text.contains("    walk       GVA 0x400000 under CR3"),
        "{text}"
    );
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "VIOLATED:");
    let examined = words.nth(1).and_then(|count| count.parse::<usize>().ok());
    assert!(examined > Some(50), "{text}");
    let walk = translate(&world.memory, pgd(&world, world.parent), TEXT);
    assert!(text.contains(&walk.to_string().lines().last().unwrap().to_string()));
}

#[test]
fn sets_and_counts_for_a_person() {
    assert_eq!(cpu_set(0), "{}");
    assert_eq!(cpu_set(0b1101), "{0, 2-3}");
    assert_eq!(cpu_set(1 << 63), "{63}");
    assert_eq!(count(1u64, "entry"), "1 entry");
    assert_eq!(count(0u64, "entry"), "0 entries");
    assert_eq!(bytes(2 << 20), "2 MiB");
    assert_eq!(vma_flag_names(1 | 1 << 60), ["READ", "0x1000000000000000"]);
    assert_eq!(pte_flags(Pte(0x80), 1), "PAT");
    assert_eq!(pte_flags(Pte(0), 1), "-");
}

#[test]
fn a_vcpu_says_in_which_function_it_stands() {
    let world = World::new();
    let mut report = machine(&world.memory, &world.snapshot(), &world.vcpus);
    assert!(!report.to_string().contains("is in"));
    report.name_addresses(|rip| (rip == world.vcpus[0].rip).then(|| "smoke (smoke.rs:7)".into()));
    let text = report.to_string();
    assert!(
        text.contains("vCPU  0 is in smoke (smoke.rs:7)\n"),
        "{text}"
    );
}
