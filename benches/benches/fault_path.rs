//! How many instructions the fault path of the guest kernel has, with the testbed, without it, and from
//! sources in which it is not written at all.
//!
//! ```text
//! cargo bench -p stalemate-benches --bench fault_path --profile dev
//! ```
//!
//! It counts the instructions that are there, not those that a fault executes (that does vmm's example
//! `instructions`): the same number each time, on every host.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use stalemate_benches::code::FaultPath;
use stalemate_benches::kernels::Build;

const BUILDS: [Build; 3] = [Build::Testbed, Build::Bare, Build::Absent];

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows = BTreeMap::<String, [usize; 3]>::new();
    let mut totals = [0; 3];
    let mut traces = [0; 3];
    for (column, build) in BUILDS.into_iter().enumerate() {
        let elf = build.elf(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
        let path = FaultPath::of(&elf)?;
        for function in path.functions() {
            let name = function
                .name
                .replace("<impl guest_kernel::kernel::Kernel<A>>::", "");
            rows.entry(name).or_default()[column] += function.code.len();
        }
        totals[column] = path.instructions();
        traces[column] = path.traces().len();
    }
    println!(
        "instructions in the code that a page fault can reach\n\n  {:<52}{:>9}{:>9}{:>9}",
        "function", "testbed", "bare", "absent"
    );
    let print = |name: &str, numbers: [usize; 3]| {
        let [a, b, c] = numbers.map(|n| if n == 0 { "-".into() } else { n.to_string() });
        println!("  {name:<52}{a:>9}{b:>9}{c:>9}");
    };
    for (name, numbers) in &rows {
        print(name, *numbers);
    }
    print("all", totals);
    print("of these, that touch the testbed", traces);
    Ok(())
}
