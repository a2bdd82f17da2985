//! Scans of page tables.

use proptest::prelude::*;

use super::{AT, PAGE, RW, map_at, space, teardown};
use crate::arch::model::testing::Machine;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(64)))]
    #[test]
    fn a_scan_finds_the_present_entries_of_its_range_and_no_others(
        touched in prop::collection::btree_set(0u64..512, 0..12),
        first in 0u64..512,
        len in 0u64..512,
    ) {
        let machine = Machine::new(1, "");
        let k = machine.kernel();
        let mm = space(k, &[0]);
        map_at(k, mm, AT, 512, RW);
        for page in &touched {
            k.user_write(0, AT + page * PAGE, 1).unwrap();
        }
        let (start, end) = (AT + first * PAGE, AT + (first + len).min(512) * PAGE);
        let mut found = Vec::new();
        // Without a touch there may be no table.
        if let Ok(table) = k.leaf_table(k.obj(mm), AT) {
            let mut rest = start;
            while let Some((gva, entry)) = k.next_entry((table, 1), rest, end) {
                prop_assert!(entry.is_present());
                found.push(gva);
                rest = gva + PAGE;
            }
        }
        let inside = |gva: &u64| (start..end).contains(gva);
        let expected: Vec<u64> = touched.iter().map(|page| AT + page * PAGE).filter(inside).collect();
        prop_assert_eq!(found, expected);
        teardown(k, &[mm]);
    }
}
