//! Names of flags, advice, error numbers and signals: Linux's for x86-64.

use std::fmt;

use abi::syscall::Errno;

/// How the names of a table combine.
#[derive(Clone, Copy)]
enum Form {
    /// A set of bits.
    Set,
    /// One value of many.
    One,
}

/// Names of one argument's values.
pub(super) struct Names {
    form: Form,
    names: &'static [(&'static str, u64)],
}

impl Names {
    pub(super) fn get(&self, name: &str) -> Option<u64> {
        self.names
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| *value)
    }

    /// A few names, for an error message.
    pub(super) fn examples(&self) -> String {
        let names: Vec<&str> = self.names.iter().take(3).map(|(name, _)| *name).collect();
        names.join(", ")
    }

    pub(super) fn show(&self, value: u64) -> impl fmt::Display + use<'_> {
        Shown { names: self, value }
    }
}

struct Shown<'a> {
    names: &'a Names,
    value: u64,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names.names;
        if let Some((name, _)) = names.iter().find(|(_, value)| *value == self.value) {
            return f.write_str(name);
        }
        let mut rest = self.value;
        if let Form::Set = self.names.form {
            for (name, bit) in names.iter().filter(|(_, bit)| *bit != 0) {
                if rest & bit == *bit {
                    rest &= !bit;
                    write!(f, "{name}{}", if rest == 0 { "" } else { "|" })?;
                }
            }
            if rest == 0 && self.value != 0 {
                return Ok(());
            }
        }
        write!(f, "{rest:#x}")
    }
}

macro_rules! names {
    ($form:ident: $($name:ident),+ $(,)?) => {
        Names { form: Form::$form, names: &[$((stringify!($name), libc::$name as u64),)+] }
    };
}

pub(super) const PROT: Names = names!(Set:
    PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC, PROT_GROWSDOWN, PROT_GROWSUP);

pub(super) const MAP: Names = names!(Set:
    MAP_PRIVATE, MAP_SHARED, MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_DENYWRITE, MAP_EXECUTABLE,
    MAP_LOCKED, MAP_NORESERVE, MAP_POPULATE, MAP_NONBLOCK, MAP_STACK, MAP_HUGETLB, MAP_SYNC,
    MAP_FIXED_NOREPLACE);

pub(super) const ADVICE: Names = names!(One:
    MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_FREE, MADV_REMOVE,
    MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
    MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_PAGEOUT,
    MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE);

pub(super) const CLONE: Names = names!(Set:
    CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PIDFD, CLONE_PTRACE, CLONE_VFORK,
    CLONE_PARENT, CLONE_THREAD, CLONE_NEWNS, CLONE_SYSVSEM, CLONE_SETTLS, CLONE_PARENT_SETTID,
    CLONE_CHILD_CLEARTID, CLONE_DETACHED, CLONE_UNTRACED, CLONE_CHILD_SETTID);

const ERRNO: Names = names!(One:
    EPERM, ENOENT, ESRCH, EINTR, EIO, ENXIO, E2BIG, ENOEXEC, EBADF, ECHILD, EAGAIN, ENOMEM, EACCES,
    EFAULT, EBUSY, EEXIST, EXDEV, ENODEV, ENOTDIR, EISDIR, EINVAL, ENFILE, EMFILE, ETXTBSY, EFBIG,
    ENOSPC, EROFS, EDOM, ERANGE, EDEADLK, ENAMETOOLONG, ENOSYS, ELOOP, EOVERFLOW, ELIBBAD,
    EOPNOTSUPP, ETIMEDOUT, EUSERS, EHWPOISON);

const SIGNAL: Names = names!(One:
    SIGHUP, SIGINT, SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGKILL, SIGUSR1, SIGSEGV,
    SIGUSR2, SIGPIPE, SIGALRM, SIGTERM, SIGSTKFLT, SIGXCPU, SIGXFSZ, SIGVTALRM, SIGPROF, SIGIO,
    SIGPWR, SIGSYS);

pub(super) fn errno_name(errno: Errno) -> Option<&'static str> {
    let mut names = ERRNO.names.iter();
    names
        .find(|(_, value)| *value == errno.0.cast_unsigned())
        .map(|(name, _)| *name)
}

pub(crate) fn errno_by_name(name: &str) -> Option<Errno> {
    ERRNO.get(name).map(|value| Errno(value.cast_signed()))
}

pub(crate) fn signal_by_name(name: &str) -> Option<u64> {
    SIGNAL.get(name)
}
