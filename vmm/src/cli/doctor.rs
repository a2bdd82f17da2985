//! `stalemate doctor`: what kind of host this is, what it can do, and how to get what is missing.

use std::fmt::Write as _;

use serde::Serialize;

use super::exit::Exit;
use super::failure::Failure;
use super::lab;
use super::output::Output;
use crate::kvm::host::{Capability, Host, HostReport, Need};
use crate::report::SCHEMA;
use crate::report::verdict::{Detail, Paint};
use crate::session;

#[derive(Serialize)]
struct Doctor<'a> {
    schema: u32,
    kind: &'static str,
    stalemate: &'static str,
    can_run: bool,
    shows_stale_translations: bool,
    host: &'a HostReport,
    /// Where the host cannot run scenarios, the command that asks the lab.
    lab_command: Option<String>,
}

pub(super) fn doctor(output: &Output) -> Result<Exit, Failure> {
    let host = Host::probe();
    let can_run = host.can_boot();
    output.json(&Doctor {
        schema: SCHEMA,
        kind: "doctor",
        stalemate: env!("CARGO_PKG_VERSION"),
        can_run,
        shows_stale_translations: session::facts_of(host.kind).shows_stale_translations,
        host: &host,
        lab_command: (!can_run).then(lab::command).flatten(),
    })?;
    output.say(&render(&host, output.paint, output.detail));
    Ok(if can_run {
        Exit::Held
    } else {
        Exit::HostCannot
    })
}

fn render(host: &HostReport, paint: Paint, detail: Detail) -> String {
    let mut text = format!("{}\n", verdict(host, paint));
    if detail == Detail::Headline {
        return text;
    }
    let _ = writeln!(
        text,
        "  {}, {} CPUs for this process, Linux {}\n",
        host.cpu_model, host.cpus, host.kernel
    );
    let width = host
        .capabilities
        .iter()
        .map(|one| one.name.len())
        .max()
        .unwrap_or(0);
    for capability in &host.capabilities {
        let name = format!("{:<width$}", capability.name);
        let _ = writeln!(
            text,
            "  {} {name}  {}",
            mark(capability, paint),
            paint.dim(&capability.detail)
        );
        if !capability.present && capability.known {
            let _ = writeln!(text, "      impossible here: {}", capability.needed_for);
            let _ = writeln!(text, "      to get it: {}", capability.how_to_get);
        }
    }
    text
}

fn verdict(host: &HostReport, paint: Paint) -> String {
    if host.can_boot() {
        let missing = host.missing().count();
        let rest = match missing {
            0 => "nothing is missing".to_owned(),
            1 => "1 thing is missing".to_owned(),
            n => format!("{n} things are missing"),
        };
        return format!(
            "{} {}; {rest}",
            paint.green("✔ scenarios can run here:"),
            host.kind.describe()
        );
    }
    let required: Vec<&str> = host
        .missing()
        .filter(|capability| capability.need == Need::Required && capability.known)
        .map(|capability| capability.name)
        .collect();
    format!(
        "{} {}; missing: {}\n{}",
        paint.red("✘ no scenario can run here:"),
        host.kind.describe(),
        required.join(", "),
        lab::advice(paint).trim_end()
    )
}

fn mark(capability: &Capability, paint: Paint) -> String {
    match (capability.present, capability.need) {
        _ if !capability.known => paint.dim("?"),
        (true, _) => paint.green("✔"),
        (false, Need::Required) => paint.red("✘"),
        (false, Need::Optional) => paint.yellow("✘"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::host::HostKind;

    fn capability(name: &'static str, present: bool, need: Need) -> Capability {
        Capability {
            name,
            present,
            known: true,
            need,
            detail: "what was seen".into(),
            needed_for: "breakfast",
            how_to_get: "ask the cook",
        }
    }

    fn host(kind: HostKind, capabilities: Vec<Capability>) -> HostReport {
        HostReport {
            kind,
            cpu_model: "Some CPU".into(),
            kernel: "6.18".into(),
            cpus: 2,
            max_vcpus: 64,
            capabilities,
        }
    }

    #[test]
    fn what_is_missing_says_what_for_and_how_to_get_it() {
        let host = host(
            HostKind::Emulating,
            vec![
                capability("/dev/kvm", true, Need::Required),
                capability("toast", false, Need::Optional),
            ],
        );
        let text = render(&host, Paint::Plain, Detail::Normal);
        assert!(
            text.starts_with("✔ scenarios can run here: emulating host"),
            "{text}"
        );
        assert!(
            text.contains("✔ /dev/kvm") && text.contains("✘ toast"),
            "{text}"
        );
        assert!(text.contains("impossible here: breakfast"), "{text}");
        assert!(text.contains("to get it: ask the cook"), "{text}");
    }

    #[test]
    fn what_could_not_be_asked_for_is_no_thing_to_get() {
        let unknown = Capability {
            known: false,
            detail: "unknown: /dev/kvm cannot be opened".into(),
            ..capability("KVM_CAP_TOAST", false, Need::Required)
        };
        let device = capability("/dev/kvm", false, Need::Required);
        let host = host(HostKind::None, vec![device, unknown]);
        let text = render(&host, Paint::Plain, Detail::Normal);
        assert!(text.contains("missing: /dev/kvm\n"), "{text}");
        assert!(
            text.contains("? KVM_CAP_TOAST  unknown: /dev/kvm cannot be opened"),
            "{text}"
        );
        assert_eq!(text.matches("ask the cook").count(), 1, "{text}");
        assert_eq!(text.matches("impossible here").count(), 1, "{text}");
    }

    #[test]
    fn a_host_that_cannot_boot_is_sent_to_the_lab() {
        let host = host(
            HostKind::None,
            vec![capability("/dev/kvm", false, Need::Required)],
        );
        let text = render(&host, Paint::Plain, Detail::Headline);
        assert!(text.starts_with("✘ no scenario can run here"), "{text}");
        assert!(
            text.contains("missing: /dev/kvm") && text.contains("scripts/lab --"),
            "{text}"
        );
    }
}
