//! Tables for people.

/// Prints `rows` under `title`, the first column to the left, the others to the right.
pub(crate) fn print<const N: usize>(title: &str, heads: [&str; N], rows: &[[String; N]]) {
    let heads = heads.map(str::to_owned);
    let all = || std::iter::once(&heads).chain(rows);
    let widths: [usize; N] = std::array::from_fn(|column| {
        all()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    println!("\n{title}\n");
    for row in all() {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            line += &match column {
                0 => format!("  {cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        println!("{}", line.trim_end());
    }
}
