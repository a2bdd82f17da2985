//! System calls that no crate of ours wraps, each behind a safe function.
#![allow(unsafe_code, reason = "ioctls that kvm-ioctls does not wrap, affinity")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{KVM_EXIT_IO_IN, KVMIO, kvm_interrupt, kvm_run};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

/// `struct kvm_signal_mask` with the kernel's 8-byte signal set behind it; the ioctl's number is
/// made from the size of the length alone.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: u64,
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Sets which signals are blocked while `vcpu` is inside KVM_RUN: bit `n - 1` for signal `n`.
pub(super) fn set_signal_mask(vcpu: &VcpuFd, blocked: u64) -> io::Result<()> {
    let mask = SignalMask {
        len: 8,
        set: blocked,
    };
    // SAFETY: the kernel reads `len` and then `len` bytes behind it, all of which are in `mask`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) })
}

/// Queues `vector` as an external interrupt (machines without an in-kernel irqchip only). The vCPU
/// must be ready for it: `ready_for_interrupt_injection` and `if_flag` of its last exit.
pub(super) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let interrupt = kvm_interrupt {
        irq: u32::from(vector),
    };
    // SAFETY: the kernel reads one `kvm_interrupt`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) })
}

/// The binary statistics of a VM or a vCPU, as a file.
pub(super) fn stats_file(fd: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the ioctl takes no argument; it makes a new descriptor.
    let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    check(stats)?;
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { File::from_raw_fd(stats) })
}

/// A KVM_EXIT_IO. `data` is as many elements of `size` bytes as the instruction moves at once: a
/// string instruction moves several.
pub(super) struct PortAccess<'a> {
    pub(super) port: u16,
    pub(super) size: usize,
    pub(super) is_read: bool,
    pub(super) data: &'a mut [u8],
}

/// Decodes the KVM_EXIT_IO that `vcpu` is in; kvm-ioctls drops the element size.
///
/// # Panics
/// Where the last exit was another one.
pub(super) fn port_access(vcpu: &mut VcpuFd) -> PortAccess<'_> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: `run` comes from a reference and is used while that borrow lasts.
    let reason = unsafe { (*run).exit_reason };
    assert_eq!(reason, kvm_bindings::KVM_EXIT_IO, "the exit is port I/O");
    // SAFETY: the exit reason says that `io` is the live field of the union.
    let io = unsafe { (*run).__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let bytes = size * io.count as usize;
    // SAFETY: KVM puts the data `data_offset` bytes into the mapping of kvm_run, `bytes` long, inside
    // that mapping, which the returned borrow of `vcpu` keeps.
    let data = unsafe {
        let first = run.cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(first, bytes)
    };
    PortAccess {
        port: io.port,
        size: size.max(1),
        is_read: u32::from(io.direction) == KVM_EXIT_IO_IN,
        data,
    }
}

/// Suberror and data of the KVM_EXIT_INTERNAL_ERROR that `vcpu` is in.
pub(super) fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return (0, Vec::new());
    }
    // SAFETY: the exit reason says that `internal` is the live field of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let words = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..words].to_vec())
}

/// Host CPUs that the calling thread may run on, in order.
pub(super) fn allowed_cpus() -> io::Result<Vec<usize>> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the size given into `set`.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) })?;
    Ok((0..libc::CPU_SETSIZE as usize)
        // SAFETY: `cpu` is below CPU_SETSIZE.
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect())
}

/// Restricts the calling thread to one host CPU.
pub(super) fn pin_to(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: an all-zero cpu_set_t is the empty set, and `cpu` is below CPU_SETSIZE.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    };
    // SAFETY: the kernel reads the size given from `set`.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) })
}

/// Asks for a userfaultfd that also resolves faults of the kernel (KVM's own accesses).
pub(super) fn userfaultfd() -> io::Result<File> {
    // SAFETY: the call takes flags only and makes a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    check(fd)?;
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// True where the process runs with user ID 0.
pub(super) fn is_root() -> bool {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_be_pinned_to_each_cpu_that_it_may_use() {
        std::thread::spawn(|| {
            let allowed = allowed_cpus().unwrap();
            assert!(!allowed.is_empty());
            pin_to(allowed[0]).unwrap();
            assert_eq!(allowed_cpus().unwrap(), [allowed[0]]);
            assert!(pin_to(usize::MAX).is_err());
        })
        .join()
        .unwrap();
    }
}
