"""What goes into the lab: the job that it runs and the initramfs that carries it, with the host files that it needs."""

import contextlib
import os
import pathlib
import re
import secrets
import shlex
import stat
import time

from common import EXIT_USAGE, PROJECT, SCRIPTS, LabError, complain

MAX_DIRECTORY_ARGUMENT_MIB = 64
# Mounted over, or the lab's own: host files cannot be put there.
RESERVED = [pathlib.PurePath(p) for p in ("/dev", "/proc", "/sys", "/lab")]
FORWARDED_ENVIRONMENT = re.compile(r"STALEMATE_\w+|RUST_BACKTRACE|RUST_LIB_BACKTRACE|RUST_LOG")


def is_reserved(path):
    return any(path == root or root in path.parents for root in RESERVED)


class Job:
    """What runs in the lab, the host files that it sees, and where its results may be."""

    def __init__(self, cwd, binary, arguments, shell_command):
        self.cwd = cwd
        self.binary = binary
        self.end_mark = f"lab-end-{secrets.token_hex(16)}"
        self.name = binary.name if binary else "the command"
        words = ["/bin/sh", "-c", shell_command] if binary is None else [f"/lab/bin/{binary.name}", *arguments]
        self.command = shlex.join(words)
        # Absolute paths that the arguments name, whether they exist or not.
        self.named = list(dict.fromkeys(path for argument in arguments for path in self.paths_in(argument)))
        outside = [path for path in self.named if cwd != path and cwd not in path.parents and path not in cwd.parents]
        self.roots = [cwd] + [path for path in outside if not is_reserved(path)]

    def paths_in(self, argument):
        """`FILE` and the FILE of `--option=FILE`."""
        words = [argument]
        if argument.startswith("-"):
            words = [argument.split("=", 1)[1]] if "=" in argument else []
        for word in words:
            if word and len(word) < 4096 and "\n" not in word and "\0" not in word:
                yield pathlib.Path(os.path.normpath(self.cwd / word))

    def script(self):
        """The part of the job that lab-init sources."""
        environment = {k: v for k, v in os.environ.items() if FORWARDED_ENVIRONMENT.fullmatch(k)}
        environment["STALEMATE_HOST_KIND"] = "lab"
        roots = " ".join(shlex.quote(str(root)) for root in self.roots)
        lines = [f"END_MARK={self.end_mark}", f"WORKING_DIRECTORY={shlex.quote(str(self.cwd))}"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        lines += [f"run_job() {{ exec {self.command}; }}"]
        lines += [f"list_results() {{ find {roots} -newer /lab/stamp '(' -type f -o -type d ')' -print0 2>/dev/null; }}"]
        return "\n".join(lines) + "\n"

    def write_initramfs(self, path, kernel, memory_mib_):
        init = SCRIPTS / "lab-init"
        with open(path, "wb") as file:
            archive = Initramfs(file)
            for directory in ("bin", "dev", "proc", "sys", "root", "tmp", "run", "lab/bin"):
                archive.directory(pathlib.PurePath("/", directory))
            archive.device_console()
            archive.file("/init", init.read_bytes(), 0o755)
            archive.file("/bin/busybox", (kernel.directory / "busybox").read_bytes(), 0o755)
            for module in sorted((kernel.directory / "modules").iterdir()):
                archive.file(f"/lab/modules/{module.name}", module.read_bytes())
            archive.file("/lab/job", self.script().encode("utf-8", "surrogateescape"))
            if self.binary:
                archive.file(f"/lab/bin/{self.binary.name}", self.binary.read_bytes(), 0o755)
            archive.directory(self.cwd)
            archive.host_tree(PROJECT / "scenarios")
            if self.cwd != PROJECT and not (self.cwd / "scenarios").exists():
                archive.symlink(self.cwd / "scenarios", PROJECT / "scenarios")
            for named in self.named:
                self.add_named(archive, named)
            archive.end()
            # The archive and the files unpacked from it are in memory at the same time, beside Linux.
            if 2 * file.tell() > (memory_mib_ - 192) * 2**20:
                raise LabError(
                    EXIT_USAGE, f"the program and its files ({file.tell() >> 20} MiB) are too much for {memory_mib_} MiB: give --memory"
                )

    def add_named(self, archive, path):
        """A file goes in as it is, a directory whole unless it is large; for a path to be written, its directory goes in."""
        if is_reserved(path):
            return
        if os.path.isfile(path):
            archive.host_file(path)
        elif os.path.isdir(path):
            archive.directory(path)
            if path == self.cwd or path in self.cwd.parents:
                return
            size = directory_size(path)
            if size > MAX_DIRECTORY_ARGUMENT_MIB * 2**20:
                complain(
                    f"{path} is empty in the lab: its {size >> 20} MiB are over {MAX_DIRECTORY_ARGUMENT_MIB} MiB; name the files instead"
                )
            else:
                archive.host_tree(path)
        elif os.path.isdir(path.parent):
            archive.directory(path.parent)


def directory_size(root):
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


class Initramfs:
    """Writes a cpio archive in the `newc` form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

    Uncompressed: under TCG, unpacking costs more than copying. Parents are added before what is in them.
    """

    def __init__(self, file):
        self.out = file
        self.inode = 0
        self.present = {pathlib.PurePath("/")}
        # Nothing may look newer than the stamp of lab-init (30 s before the job), whatever the host's files say.
        self.latest_mtime = int(time.time()) - 60

    def entry(self, path, mode, data=b"", mtime=None, device=(0, 0)):
        self.inode += 1
        mtime = min(mtime or self.latest_mtime, self.latest_mtime)
        name = os.fsencode(str(path).lstrip("/")) + b"\0"
        fields = (self.inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self.out.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))

    def add(self, path, mode, data=b"", mtime=None):
        path = pathlib.PurePath(path)
        if path in self.present:
            return
        self.directory(path.parent)
        self.present.add(path)
        self.entry(path, mode, data, mtime)

    def directory(self, path):
        path = pathlib.PurePath(path)
        if path not in self.present:
            self.add(path, stat.S_IFDIR | (0o1777 if path == pathlib.PurePath("/tmp") else 0o755))

    def file(self, path, data, mode=0o644):
        self.add(path, stat.S_IFREG | mode, data)

    def symlink(self, path, target):
        self.add(path, stat.S_IFLNK | 0o777, os.fsencode(str(target)))

    def device_console(self):
        self.directory("/dev")
        self.entry("/dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def host_file(self, path):
        """A file of the host, at its own path; a symbolic link goes in as the file that it names."""
        try:
            status = path.stat()
            self.add(path, stat.S_IFREG | stat.S_IMODE(status.st_mode), path.read_bytes(), int(status.st_mtime))
        except OSError as error:
            raise LabError(EXIT_USAGE, f"{path} cannot be read: {error.strerror}") from error

    def host_tree(self, root):
        if not root.is_dir():
            return
        self.directory(root)
        for directory, directories, names in os.walk(root):
            directories.sort()
            for name in directories:
                self.directory(pathlib.PurePath(directory, name))
            for name in sorted(names):
                path = pathlib.Path(directory, name)
                if path.is_file():
                    self.host_file(path)

    def end(self):
        self.entry("TRAILER!!!", 0, mtime=1)
