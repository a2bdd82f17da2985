//! A crash for a person, at most 100 columns wide where the guest's names permit: what happened and
//! where each vCPU stood, then each vCPU from its backtrace to its last events.

use std::fmt::{self, Display};
use std::time::Duration;

use super::words;
use super::{CrashReport, EventReport, Frame, VcpuReport};
use crate::control::CrashCause;
use crate::report::symbols::Location;
use crate::report::verdict::format_time;

impl Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The guest crashed: {}", self.summary)?;
        if let Some(vcpu) = self.vcpu {
            write!(f, " (vCPU {vcpu})")?;
        }
        write!(f, "\n{}", self.body())
    }
}

/// All but the cause.
pub(super) struct Body<'a>(pub(super) &'a CrashReport);

impl Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        match &report.cause {
            CrashCause::InternalError { data, .. } => {
                let words: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
                writeln!(f, "  data: {}", words.join(" "))?;
            }
            CrashCause::NoProgress { .. } => writeln!(
                f,
                "  no system call, fault, interrupt, switch or exit on any vCPU; limits.watchdog gives it longer"
            )?,
            CrashCause::DidNotFinish { still, .. } if *still < 1.0 => {
                writeln!(f, "  it was getting on to the end: --timeout gives it more")?;
            }
            CrashCause::DidNotFinish { still, .. } => writeln!(
                f,
                "  for the last {still:.0} s no vCPU got anywhere; --timeout gives it more"
            )?,
            _ => {}
        }
        for vcpu in &report.vcpus {
            summary(f, vcpu)?;
        }
        for vcpu in &report.vcpus {
            writeln!(f)?;
            vcpu.fmt(f)?;
        }
        if !report.console.is_empty() {
            writeln!(f, "\nLast lines of the console:")?;
            for line in &report.console {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

/// Where a vCPU stood, in one line, and how its kernel failed, in another.
fn summary(f: &mut fmt::Formatter<'_>, vcpu: &VcpuReport) -> fmt::Result {
    let doing = match vcpu.task {
        _ if vcpu.snapshot.halted => "halted".to_owned(),
        Some(task) => format!("task {task}"),
        None => "no task".to_owned(),
    };
    write!(f, "  vCPU {:<2}  {doing:<8}", vcpu.snapshot.index)?;
    let site = vcpu.backtrace.get(vcpu.site);
    match site.and_then(own_function) {
        Some(location) => writeln!(
            f,
            "  in {}  {}",
            words::brief(&location.function),
            Line(location)
        )?,
        None => writeln!(f, "  at {:#x}", vcpu.regs().rip)?,
    }
    if let Some(entry) = site.and_then(|frame| frame.entry.as_ref()) {
        let gva = vcpu.cr2_walk.as_ref().map(|walk| walk.gva);
        writeln!(f, "           {}", words::entry(entry, gva))?;
    }
    let mut entries = vcpu
        .backtrace
        .iter()
        .filter_map(|frame| frame.entry.as_ref());
    if let Some(entry) = entries.rfind(|entry| entry.cpl == 3) {
        writeln!(f, "           in {}", words::entry(entry, None))?;
    }
    Ok(())
}

/// The innermost function of a frame that is not of Rust's library.
fn own_function(frame: &Frame) -> Option<&Location> {
    own_functions(frame).first()
}

/// The functions of a frame without what it has inlined of Rust's library.
fn own_functions(frame: &Frame) -> &[Location] {
    let functions = &frame.functions;
    let own = functions
        .iter()
        .position(|location| !location.function.starts_with("core::"));
    &functions[own.unwrap_or(0)..]
}

impl Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpu = &self.snapshot;
        write!(f, "vCPU {}: CPL {}", vcpu.index, vcpu.cpl())?;
        if vcpu.halted {
            write!(f, ", halted")?;
        }
        writeln!(f, ", last exit: {}", vcpu.last_exit)?;
        backtrace(f, self)?;
        if let Some(walk) = &self.cr2_walk {
            writeln!(f, "  CR2: {}", Indented(walk))?;
        }
        registers(f, self)?;
        if self.code.is_empty() {
            writeln!(
                f,
                "  code: RIP cannot be read: {}",
                Indented(&self.rip_walk)
            )?;
        } else if !vcpu.halted {
            writeln!(f, "  code:")?;
            for (number, line) in self.code.iter().enumerate() {
                let mark = if number == 0 { '>' } else { ' ' };
                writeln!(
                    f,
                    "   {mark} {:016x}  {:<30}  {}",
                    line.address.0, line.bytes, line.text
                )?;
            }
        }
        if !self.events.is_empty() {
            writeln!(f, "  last events:")?;
            for event in &self.events {
                writeln!(f, "    {event}")?;
            }
        }
        Ok(())
    }
}

fn backtrace(f: &mut fmt::Formatter<'_>, vcpu: &VcpuReport) -> fmt::Result {
    writeln!(f, "  backtrace:")?;
    if vcpu.site > 0 {
        let left_out = vcpu.site;
        writeln!(
            f,
            "        (the panic itself, {left_out} deep, is left out)"
        )?;
    }
    for (number, frame) in vcpu.backtrace.iter().enumerate().skip(vcpu.site) {
        if let Some(entry) = &frame.entry {
            writeln!(f, "        -- {} --", words::entry(entry, None))?;
        }
        write!(f, "    {number:>2}  {:016x}", frame.address.0)?;
        if frame.functions.is_empty() {
            writeln!(f, "  (unknown)")?;
        }
        for (depth, location) in own_functions(frame).iter().enumerate() {
            let margin = if depth == 0 { 2 } else { 26 };
            let mut name = words::brief(&location.function);
            if location.inlined {
                name.push_str(" (inlined)");
            }
            let line = format!("{:margin$}{name:<32}  {}", "", Line(location));
            writeln!(f, "{}", line.trim_end())?;
        }
    }
    Ok(())
}

/// `file:line`.
struct Line<'a>(&'a Location);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.file, self.0.line) {
            (Some(file), Some(line)) => write!(f, "{file}:{line}"),
            (Some(file), None) => f.write_str(file),
            (None, _) => Ok(()),
        }
    }
}

fn registers(f: &mut fmt::Formatter<'_>, vcpu: &VcpuReport) -> fmt::Result {
    let at = match vcpu.backtrace.get(vcpu.site) {
        Some(frame) if frame.entry.is_some() => " where the kernel faulted",
        _ => "",
    };
    writeln!(f, "  registers{at}:")?;
    for row in vcpu.regs().named().chunks(4) {
        let row: Vec<_> = row
            .iter()
            .map(|(name, value)| format!("{name:>6} {value:016x}"))
            .collect();
        writeln!(f, " {}", row.join(" "))?;
    }
    let sregs = &vcpu.snapshot.sregs;
    writeln!(
        f,
        "     cr0 {:x}  cr2 {:x}  cr3 {:x}  cr4 {:x}  efer {:x}  cs {:x}  ss {:x}",
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer, sregs.cs, sregs.ss
    )
}

impl Display for EventReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = match self.before_ns {
            Some(0) => "0".to_owned(),
            Some(ns) => format!("-{}", format_time(Duration::from_nanos(ns))),
            None => format!("tsc {:x}", self.tsc),
        };
        write!(
            f,
            "{time:>8}  task {}  {}{}",
            self.task,
            self.kind,
            words::arguments(self)
        )
    }
}

/// Text of several lines, the second and later ones moved to the right.
struct Indented<T>(T);

impl<T: Display> Display for Indented<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(&text.trim_end().replace('\n', "\n    "))
    }
}
