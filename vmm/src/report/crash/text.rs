//! A crash for a person, at most 100 columns wide where the guest's names permit.

use std::fmt::{self, Display};

use super::{CrashReport, EventReport, VcpuReport};
use crate::control::CrashCause;
use crate::kvm::vcpu::VcpuSnapshot;

impl Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The guest crashed: {}", self.summary)?;
        match self.vcpu {
            Some(vcpu) => writeln!(f, " (vCPU {vcpu})")?,
            None => writeln!(f)?,
        }
        if let CrashCause::InternalError { data, .. } = &self.cause {
            let words: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
            writeln!(f, "  data: {}", words.join(" "))?;
        }
        for vcpu in &self.vcpus {
            writeln!(f)?;
            vcpu.fmt(f)?;
        }
        if !self.console.is_empty() {
            writeln!(f, "\nLast lines of the console:")?;
            for line in &self.console {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

impl Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        registers(f, &self.snapshot)?;
        writeln!(f, "  code:")?;
        if self.code.is_empty() {
            writeln!(f, "    RIP cannot be read: {}", Indented(&self.rip_walk))?;
        }
        for (number, line) in self.code.iter().enumerate() {
            let mark = if number == 0 { '>' } else { ' ' };
            writeln!(
                f,
                "  {mark} {:016x}  {:<30}  {}",
                line.address.0, line.bytes, line.text
            )?;
        }
        writeln!(f, "  backtrace:")?;
        for (number, frame) in self.backtrace.iter().enumerate() {
            write!(f, "    {number:>2}: {:016x}", frame.address.0)?;
            if frame.functions.is_empty() {
                writeln!(f, "  (unknown)")?;
            }
            for (depth, location) in frame.functions.iter().enumerate() {
                let margin = if depth == 0 { 2 } else { 26 };
                write!(f, "{:margin$}{}", "", location.function)?;
                if location.inlined {
                    write!(f, " (inlined)")?;
                }
                if let Some(file) = &location.file {
                    write!(f, " at {file}")?;
                    if let Some(line) = location.line {
                        write!(f, ":{line}")?;
                    }
                }
                writeln!(f)?;
            }
        }
        if let Some(walk) = &self.cr2_walk {
            writeln!(f, "  CR2: {}", Indented(walk))?;
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

fn registers(f: &mut fmt::Formatter<'_>, vcpu: &VcpuSnapshot) -> fmt::Result {
    write!(f, "vCPU {}: CPL {}", vcpu.index, vcpu.cpl())?;
    if vcpu.halted {
        write!(f, ", halted")?;
    }
    writeln!(f, ", last exit: {}", vcpu.last_exit)?;
    for row in vcpu.regs.named().chunks(4) {
        write!(f, " ")?;
        for (name, value) in row {
            write!(f, " {name:>6} {value:016x}")?;
        }
        writeln!(f)?;
    }
    let sregs = &vcpu.sregs;
    writeln!(
        f,
        "  cr0 {:x}  cr2 {:x}  cr3 {:x}  cr4 {:x}  efer {:x}  cs {:x}  ss {:x}",
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer, sregs.cs, sregs.ss
    )
}

impl Display for EventReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>6}  tsc {:x}  task {}  {}",
            self.sequence, self.tsc, self.task, self.kind
        )?;
        for (name, value) in &self.args {
            write!(f, " {name}={value}")?;
        }
        Ok(())
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
