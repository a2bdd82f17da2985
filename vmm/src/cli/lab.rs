//! The way out of a host that cannot: the same arguments in the lab.

use std::path::Path;

use crate::report::verdict::{Paint, shell_words};

/// The words of this process's command line, the program's name first.
#[must_use]
pub(super) fn own_command() -> Vec<String> {
    let arguments = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned());
    std::iter::once("stalemate".to_owned())
        .chain(arguments)
        .collect()
}

/// The command that does the same in the lab; none where this already is the lab.
#[must_use]
pub(super) fn command() -> Option<String> {
    let inside = std::env::var_os("STALEMATE_HOST_KIND").is_some_and(|kind| kind == "lab");
    let mut words = vec![script(), "--".to_owned()];
    words.extend(own_command().into_iter().skip(1));
    (!inside).then(|| shell_words(&words))
}

/// The lines that name that command.
#[must_use]
pub(super) fn advice(paint: Paint) -> String {
    match command() {
        Some(command) => format!(
            "  {} the lab needs no KVM; the same there:\n    {command}\n",
            paint.bold("help:")
        ),
        None => String::new(),
    }
}

/// `scripts/lab` as it can be called from here.
fn script() -> String {
    let relative = Path::new("scripts/lab");
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("scripts")
        .join("lab");
    if !relative.exists() && built_from.exists() {
        return built_from.to_string_lossy().into_owned();
    }
    relative.to_string_lossy().into_owned()
}
