//! User programs that keep every vCPU busy: each forks a process per CPU, and each process stays on
//! its own. They are not among the guest's programs, because they check nothing and never end.
#![allow(unsafe_code, reason = "labels of an assembly block")]

use std::arch::global_asm;

use abi::layout::USER_IMAGE_GVA;
use abi::syscall::{map, nr, prot};

/// What the vCPUs are busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// A loop at CPL 3.
    User,
    /// mmap, a write and munmap, for ever: nearly always at CPL 0 where that is emulated.
    Kernel,
}

impl Workload {
    pub(crate) const ALL: [Self; 2] = [Self::User, Self::Kernel];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Kernel => "kernel",
        }
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::User => "busy at CPL 3 (a loop)",
            Self::Kernel => "busy in the kernel (mmap, write, munmap for ever)",
        }
    }

    /// The user image.
    pub(crate) fn image(self) -> Vec<u8> {
        let code = match self {
            Self::User => between(
                &raw const stalemate_busy_user,
                &raw const stalemate_busy_kernel,
            ),
            Self::Kernel => between(
                &raw const stalemate_busy_kernel,
                &raw const stalemate_busy_end,
            ),
        };
        executable(code)
    }
}

unsafe extern "C" {
    static stalemate_busy_user: u8;
    static stalemate_busy_kernel: u8;
    static stalemate_busy_end: u8;
}

// Position independent; data of this program, code only in the guest.
global_asm!(
    // Forks until there is a process for each CPU, and stays on CPU ebx.
    ".macro stalemate_one_per_cpu",
    "mov eax, {nr_cpus}",
    "syscall",
    "mov ebx, eax",
    "2: dec ebx",
    "jz 3f",
    "mov eax, {fork}",
    "syscall",
    "test eax, eax",
    "jnz 2b",
    "3: mov ecx, ebx",
    "mov eax, 1",
    "shl rax, cl",
    "push rax",
    "xor edi, edi",
    "mov esi, 8",
    "mov rdx, rsp",
    "mov eax, {setaffinity}",
    "syscall",
    ".endm",
    ".pushsection .rodata.stalemate_busy, \"a\"",
    "stalemate_busy_user:",
    "stalemate_one_per_cpu",
    "4: inc rax",
    "jmp 4b",
    "stalemate_busy_kernel:",
    "stalemate_one_per_cpu",
    "5: xor edi, edi",
    "mov esi, 4096",
    "mov edx, {rw}",
    "mov r10d, {anonymous}",
    "mov r8, -1",
    "xor r9d, r9d",
    "mov eax, {mmap}",
    "syscall",
    "mov qword ptr [rax], 1",
    "mov rdi, rax",
    "mov esi, 4096",
    "mov eax, {munmap}",
    "syscall",
    "jmp 5b",
    "stalemate_busy_end:",
    ".popsection",
    nr_cpus = const nr::TESTBED_NR_CPUS,
    fork = const nr::FORK,
    setaffinity = const nr::SCHED_SETAFFINITY,
    mmap = const nr::MMAP,
    munmap = const nr::MUNMAP,
    rw = const prot::READ | prot::WRITE,
    anonymous = const map::PRIVATE | map::ANONYMOUS,
);

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    let len = end.addr() - start.addr();
    // SAFETY: both are labels of the block above, the second one behind the first, with nothing but
    // initialised read-only bytes between them.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// A static executable of one segment, entered at its first byte.
fn executable(code: &[u8]) -> Vec<u8> {
    const HEADER: u16 = 64;
    const PROGRAM_HEADER: u16 = 56;
    const READ_EXECUTE: u32 = 5;
    let len = code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2_u16.to_le_bytes()); // ET_EXEC
    put(&62_u16.to_le_bytes()); // EM_X86_64
    put(&1_u32.to_le_bytes());
    put(&USER_IMAGE_GVA.to_le_bytes()); // e_entry
    put(&u64::from(HEADER).to_le_bytes()); // e_phoff
    put(&[0; 12]); // no sections, no flags
    for half in [HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1_u32.to_le_bytes()); // PT_LOAD
    put(&READ_EXECUTE.to_le_bytes());
    let offset = u64::from(HEADER + PROGRAM_HEADER);
    for word in [offset, USER_IMAGE_GVA, USER_IMAGE_GVA, len, len, 0x1000] {
        put(&word.to_le_bytes());
    }
    put(code);
    file
}
