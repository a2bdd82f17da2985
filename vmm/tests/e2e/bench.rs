//! What operations cost is measured, in the guest and on Linux. How much it is, is no test's business.

use serde_json::Value;

use super::{doctor, stalemate, text};

#[test]
fn operations_are_measured_in_the_guest_and_on_linux() {
    let host = doctor()["host"]["kind"].clone();
    let output = stalemate(&[
        "bench", "getpid", "fault", "cow", "--rounds", "10", "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let result: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let ops = result["ops"].as_array().expect("operations");
    assert_eq!(ops.len(), 3, "{result}");
    for op in ops {
        for place in [&op["guest"]["ticks"], &op["linux"]] {
            assert_eq!(place["rounds"], 10, "{op}");
            assert!(place["p50"].as_u64() > Some(0), "{op}");
        }
        // One or the other: an emulated CPL 0 has no time to compare.
        let (counted, compared) = (&op["guest"]["instructions"], &op["ratio"]);
        assert_ne!(counted.is_number(), compared.is_number(), "{host}: {op}");
    }
}
