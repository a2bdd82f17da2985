//! What the kernel says of its VMAs.

use abi::oracle::Area;

use super::{AT, PAGE, RW, map_at, space, teardown};
use crate::arch::model::testing::Machine;

#[test]
fn areas_are_told_in_order_and_only_those_of_the_range() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 4, RW);
    k.mprotect(mm, AT + PAGE, PAGE, 0).unwrap();
    map_at(k, mm, AT + 8 * PAGE, 1, 5);
    let area = |from, to, flags| Area {
        start: AT + from * PAGE,
        end: AT + to * PAGE,
        flags,
    };
    let all = [area(0, 1, RW), area(1, 2, 0), area(2, 4, RW), area(8, 9, 5)];
    let told = |from, to, room: usize| {
        let mut areas = vec![Area::default(); room];
        let found = k.areas(mm, AT + from * PAGE, AT + to * PAGE, &mut areas);
        areas.truncate(found);
        areas
    };
    assert_eq!(told(0, 100, 8), all);
    assert_eq!(told(0, 100, 2), all[..2]);
    // Those that reach into the range are told whole.
    assert_eq!(told(3, 8, 8), all[2..3]);
    assert_eq!(told(4, 8, 8), []);
    teardown(k, &[mm]);
}
