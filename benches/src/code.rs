//! The code of a kernel image that a page fault can reach, from its disassembly.
//!
//! The closure of the direct calls and jumps of the fault handler, of whole functions; a call that leads to
//! a panic ends it, because what a panic does is not on any path that goes on. It is complete only without
//! indirect calls, so [`FaultPath::of`] refuses them.

use std::collections::{BTreeMap, BTreeSet};

use abi::objects::KernelRoot;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
    Register,
};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SegmentFlags, SymbolKind, elf};

/// Where the path begins: what the page-fault entry and the kernel's own accesses to user memory call,
/// as far as each is a function of its own.
const ROOTS: [&str; 3] = ["user_fault", "kernel_user_fault", "handle_fault"];
/// Functions of which no path comes back.
const NO_RETURN: [&str; 6] = [
    "core::panicking::",
    "core::result::unwrap_failed",
    "core::option::",
    "core::slice::index::slice_index_fail",
    "__rustc::rust_begin_unwind",
    "guest_kernel::arch::x86_64::panic::",
];
/// Offset in a CPU's area of the pointer to its channel (`arch::x86_64::percpu`).
const CHANNEL: u64 = 8;
/// Addresses of the kernel image: where things lie differs between builds that do the same.
const IMAGE: u64 = 0xffff_ffff_8000_0000;

/// A function and its instructions.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name, without a hash.
    pub name: String,
    /// Its instructions, in the order of their addresses.
    pub code: Vec<Instruction>,
    /// Where its calls through constant pointers lead (the global offset table), by the address of the call.
    through: BTreeMap<u64, u64>,
}

/// Why an image has no fault path that can be told.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// It is no ELF file.
    #[error("the kernel image is no ELF file")]
    Elf(#[from] object::read::Error),
    /// It has no such function.
    #[error("the kernel image has no function `{0}`")]
    NoFunction(&'static str),
    /// The closure cannot be told.
    #[error("`{function}` calls through a register or memory at {at:#x}: what it calls is unknown")]
    Indirect {
        /// In which function.
        function: String,
        /// Address of the call.
        at: u64,
    },
}

/// Everything that a page fault can execute and come back from.
#[derive(Clone, Debug)]
pub struct FaultPath {
    /// By address.
    functions: BTreeMap<u64, Function>,
}

impl FaultPath {
    /// The path in the ELF file `image`.
    ///
    /// # Errors
    /// What makes it impossible to tell.
    pub fn of(image: &[u8]) -> Result<Self, CodeError> {
        let all = functions(image)?;
        let is_root = |name: &str| {
            ROOTS
                .iter()
                .any(|root| name.ends_with(&format!("::{root}")))
        };
        let mut open: Vec<u64> = all
            .iter()
            .filter(|(_, function)| is_root(&function.name))
            .map(|(address, _)| *address)
            .collect();
        let handler = open
            .iter()
            .any(|at| all[at].name.ends_with("::handle_fault"));
        if !handler {
            return Err(CodeError::NoFunction("handle_fault"));
        }
        let mut reached = BTreeSet::new();
        while let Some(address) = open.pop() {
            if !reached.insert(address) {
                continue;
            }
            for target in targets(&all[&address])? {
                let callee = all.range(..=target).next_back();
                if let Some((at, callee)) = callee
                    && !NO_RETURN.iter().any(|name| callee.name.starts_with(name))
                {
                    open.push(*at);
                }
            }
        }
        let functions = all.into_iter().filter(|(at, _)| reached.contains(at));
        Ok(Self {
            functions: functions.collect(),
        })
    }

    /// Its functions.
    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.functions.values()
    }

    /// Number of its instructions, padding between functions left out.
    #[must_use]
    pub fn instructions(&self) -> usize {
        self.functions().map(|function| function.code.len()).sum()
    }

    /// Every instruction that has to do with the testbed, and what.
    #[must_use]
    pub fn traces(&self) -> Vec<Trace> {
        let mut info = InstructionInfoFactory::new();
        let mut found = Vec::new();
        for function in self.functions() {
            if function.name.contains("testbed") {
                found.push(Trace::Function(function.name.clone()));
            }
            for (index, instruction) in function.code.iter().enumerate() {
                if is_for_disk(&function.code[..index], instruction) {
                    continue;
                }
                found.extend(trace(instruction, &mut info).map(|kind| kind(function, instruction)));
            }
        }
        found
    }

    /// The code without addresses, one line for each function and instruction: the same for two images whose
    /// fault paths do the same.
    #[must_use]
    pub fn listing(&self) -> Vec<String> {
        let mut functions: Vec<_> = self.functions().collect();
        functions.sort_by(|a, b| (&a.name, a.code.len()).cmp(&(&b.name, b.code.len())));
        let lines = |function: &Function| {
            let head = format!("{}:", function.name);
            let code = function.code.iter().map(|one| self.line(function, one));
            std::iter::once(head).chain(code).collect::<Vec<_>>()
        };
        functions.into_iter().flat_map(lines).collect()
    }

    fn line(&self, function: &Function, instruction: &Instruction) -> String {
        let mut line = format!("  {:?}", instruction.code());
        for operand in 0..instruction.op_count() {
            line += &match instruction.op_kind(operand) {
                OpKind::Register => format!(" {:?}", instruction.op_register(operand)),
                OpKind::NearBranch64 => self.place(function, instruction.near_branch_target()),
                OpKind::Memory => format!(
                    " {:?}:[{:?}+{:?}*{}+{}]",
                    instruction.segment_prefix(),
                    instruction.memory_base(),
                    instruction.memory_index(),
                    instruction.memory_index_scale(),
                    constant(instruction.memory_displacement64())
                ),
                _ => match instruction.try_immediate(operand) {
                    Ok(value) => format!(" {}", constant(value)),
                    Err(_) => format!(" {:?}", instruction.op_kind(operand)),
                },
            };
        }
        line
    }

    /// Where a branch leads: so many bytes into this function, or to another one.
    fn place(&self, function: &Function, target: u64) -> String {
        let start = function.code.first().map_or(0, Instruction::ip);
        match self.functions.range(..=target).next_back() {
            Some((at, _)) if *at == start => format!(" +{:#x}", target - start),
            Some((at, callee)) if *at == target => format!(" {}", callee.name),
            _ => " out of the path".into(),
        }
    }
}

/// What has to do with the testbed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trace {
    /// A function of its module.
    Function(String),
    /// The pointer to this CPU's channel (budget, traps, event mask, failpoints, ring) is read.
    Channel(String),
    /// A ticket is drawn.
    Ticket(String),
    /// The time stamp counter is read.
    Stamp(String),
    /// The doorbell is rung, or anything else but the disk's is written to a port.
    Port(String),
}

/// True where `instruction` asks the disk for something, as reclaim and swap do in every kernel: `before` it the port's
/// number is loaded.
fn is_for_disk(before: &[Instruction], instruction: &Instruction) -> bool {
    let loads = |it: &&Instruction| it.op0_register().full_register() == Register::RDX;
    let port = before.iter().rev().find(loads);
    let port = port.and_then(|it| it.try_immediate(1).ok());
    instruction.mnemonic() == Mnemonic::Out && port == Some(u64::from(abi::port::DISK))
}

type Kind = fn(&Function, &Instruction) -> Trace;

fn trace(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Option<Kind> {
    fn at(function: &Function, instruction: &Instruction) -> String {
        format!("{} {:#x}: {instruction}", function.name, instruction.ip())
    }
    match instruction.mnemonic() {
        Mnemonic::Out | Mnemonic::Outsb => return Some(|f, i| Trace::Port(at(f, i))),
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => return Some(|f, i| Trace::Stamp(at(f, i))),
        _ => {}
    }
    let ticket = std::mem::offset_of!(KernelRoot, ticket) as u64;
    for memory in info.info(instruction).used_memory() {
        let displacement = memory.displacement();
        if memory.segment() == Register::GS && displacement == CHANNEL {
            return Some(|f, i| Trace::Channel(at(f, i)));
        }
        if instruction.has_lock_prefix() && displacement == ticket {
            return Some(|f, i| Trace::Ticket(at(f, i)));
        }
    }
    None
}

/// A constant, or that it is an address of the image.
fn constant(value: u64) -> String {
    if (IMAGE..u64::MAX - (1 << 20)).contains(&value) {
        "an address of the image".into()
    } else {
        format!("{value:#x}")
    }
}

/// Where `function` calls and jumps to, outside itself.
fn targets(function: &Function) -> Result<Vec<u64>, CodeError> {
    let (first, last) = match function.code.as_slice() {
        [first, .., last] => (first.ip(), last.ip()),
        _ => return Ok(Vec::new()),
    };
    let mut targets = Vec::new();
    for instruction in &function.code {
        match instruction.flow_control() {
            FlowControl::Call
            | FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch => targets.push(instruction.near_branch_target()),
            FlowControl::IndirectCall | FlowControl::IndirectBranch => {
                match function.through.get(&instruction.ip()) {
                    Some(target) => targets.push(*target),
                    // A jump of a `match`, inside the function.
                    None if instruction.flow_control() == FlowControl::IndirectBranch => {}
                    None => {
                        return Err(CodeError::Indirect {
                            function: function.name.clone(),
                            at: instruction.ip(),
                        });
                    }
                }
            }
            _ => {}
        }
    }
    targets.retain(|target| !(first..=last).contains(target));
    Ok(targets)
}

fn functions(image: &[u8]) -> Result<BTreeMap<u64, Function>, CodeError> {
    let file = object::File::parse(image)?;
    let mut functions = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(section) = symbol.section_index() else {
            continue;
        };
        if symbol.kind() != SymbolKind::Text || symbol.size() == 0 {
            continue;
        }
        let section = file.section_by_index(section)?;
        let bytes = section.data_range(symbol.address(), symbol.size())?;
        let Some(bytes) = bytes else { continue };
        let name = symbol.name().unwrap_or("");
        let name = format!("{:#}", rustc_demangle::demangle(name));
        let decoder = Decoder::with_ip(64, bytes, symbol.address(), DecoderOptions::NONE);
        let code: Vec<_> = decoder.into_iter().collect();
        let through = code
            .iter()
            .filter(|one| {
                one.is_ip_rel_memory_operand()
                    && (one.is_call_near_indirect() || one.is_jmp_near_indirect())
            })
            .filter_map(|one| Some((one.ip(), constant_word(&file, one.ip_rel_memory_address())?)))
            .collect();
        let function = Function {
            name,
            code,
            through,
        };
        functions.insert(symbol.address(), function);
    }
    Ok(functions)
}

/// The word at `address`, if it lies in a segment that is mapped read-only.
fn constant_word(file: &object::File<'_>, address: u64) -> Option<u64> {
    let segment = file.segments().find(|segment| {
        let range = segment.address()..segment.address() + segment.size();
        range.contains(&address)
            && matches!(segment.flags(), SegmentFlags::Elf { p_flags, .. } if p_flags.0 & elf::PF_W.0 == 0)
    })?;
    let bytes = segment.data_range(address, 8).ok()??;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
