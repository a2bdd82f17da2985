"""What the lab is made of: QEMU, Debian's kernel and busybox in the cache, and a static stalemate.

Asks Debian only for what is not there. Never starts the machine.
"""

import fcntl
import lzma
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import tempfile

from common import EXIT_CANNOT, EXIT_LAB_DIED, EXIT_USAGE, PROJECT, LabError, Speech, complain, say, tail

TARGET = "x86_64-unknown-linux-gnu"
# Virtio carries the streams; KVM is what the lab is for. Dependencies are added from the modules' own `depends=`.
WANTED_MODULES = ["virtio_pci", "virtio_console", "kvm-amd"]


def command(*words, **kwargs):
    """A child whose output is read, in the C locale, bounded in time."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(
            [str(w) for w in words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            **kwargs,
        )
    except FileNotFoundError:
        raise LabError(EXIT_CANNOT, f"'{words[0]}' is missing: the lab is made of Debian's packages and needs apt and dpkg") from None
    except subprocess.TimeoutExpired:
        raise LabError(EXIT_CANNOT, f"{' '.join(map(str, words))} did not end within 900 s") from None


def need_qemu():
    if shutil.which("qemu-system-x86_64"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(EXIT_CANNOT, "qemu-system-x86_64 is missing: as root, apt-get install --no-install-recommends qemu-system-x86")
    say("installing qemu-system-x86 (apt-get)")
    install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends", "qemu-system-x86"]
    done = command(*install)
    if done.returncode != 0:
        command("apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
        done = command(*install)
    if done.returncode != 0 or not shutil.which("qemu-system-x86_64"):
        raise LabError(EXIT_CANNOT, "apt-get cannot install qemu-system-x86", tail(done.stderr or done.stdout))


def cache_directory():
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = pathlib.Path(base) if base.startswith("/") else pathlib.Path.home() / ".cache"
    return base / "stalemate" / "lab"


class Kernel:
    """One kernel in the cache: a directory NAME_VERSION with vmlinuz, modules/, modules/order and busybox.

    It is filled beside its place and renamed into it, so a directory that exists is complete.
    """

    META = "linux-image-cloud-amd64"
    NAME = re.compile(r"linux-image-([0-9][^\s_]*-cloud-amd64)_(\S+)")

    def __init__(self, directory):
        match = self.NAME.fullmatch(directory.name)
        self.directory = directory
        self.release = match[1]
        self.package_version = match[2].replace("%3a", ":")

    @classmethod
    def newest_in(cls, cache):
        found = [p for p in cache.glob("linux-image-*") if cls.NAME.fullmatch(p.name) and p.is_dir()]
        return cls(max(found, key=lambda p: p.stat().st_mtime)) if found else None

    @classmethod
    def provide(cls, refresh):
        """The newest kernel of the cache; asks Debian only when there is none or `refresh` is set."""
        cache = cache_directory()
        cached = cls.newest_in(cache)
        if cached and not refresh:
            return cached
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / "lock", "w", encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                cached = cls.newest_in(cache)  # another lab may have filled it while this one waited
                if cached and not refresh:
                    return cached
                return cls.fetch(cache, cached)
        except OSError as error:
            raise LabError(EXIT_CANNOT, f"the cache {cache} cannot be written: {error}") from error

    @classmethod
    def fetch(cls, cache, cached):
        try:
            package, version = cls.candidate()
            place = cache / f"{package}_{version.replace(':', '%3a')}"
            if place.is_dir():
                os.utime(place)
                return cls(place)
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
                scratch = pathlib.Path(scratch)
                say(f"fetching {package} {version} (apt-get download)")
                tree = unpack_package(scratch, f"{package}={version}")
                new = scratch / "kernel"
                collect_kernel(tree, package.removeprefix("linux-image-"), new)
                shutil.copyfile(find_busybox(scratch), new / "busybox")
                new.rename(place)
            return cls(place)
        except LabError as error:
            if not cached:
                raise
            complain(f"{error}; keeping Linux {cached.release} of the cache")
            return cached

    @classmethod
    def candidate(cls):
        """Package and version of the newest cloud kernel that apt knows."""
        for attempt in ("as it is", "updated"):
            if attempt == "updated":
                if os.geteuid() != 0:
                    raise LabError(
                        EXIT_CANNOT, f"apt does not know {cls.META}: as root, apt-get update (the lab needs Debian's amd64 archive)"
                    )
                say("updating the package lists (apt-get update)")
                command("apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
            meta = command("apt-cache", "show", "--no-all-versions", cls.META).stdout
            depends = re.search(r"^Depends:.*?\b(linux-image-[0-9]\S*-cloud-amd64)\b", meta, re.MULTILINE)
            if not depends:
                continue
            shown = command("apt-cache", "show", "--no-all-versions", depends[1]).stdout
            version = re.search(r"^Version: (\S+)", shown, re.MULTILINE)
            if version:
                return depends[1], version[1]
        raise LabError(EXIT_CANNOT, f"apt does not know {cls.META}, even after apt-get update: the lab needs Debian's amd64 archive")


def unpack_package(scratch, package):
    """Downloads a package and unpacks it without installing it; returns the tree."""
    directory = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    # As root, apt would drop to a user who may not enter this directory, and warn.
    as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    done = command("apt-get", *as_root, "download", package, cwd=directory)
    if done.returncode != 0 and os.geteuid() == 0:
        command("apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
        done = command("apt-get", *as_root, "download", package, cwd=directory)
    files = list(directory.glob("*.deb"))
    if done.returncode != 0 or not files:
        raise LabError(EXIT_CANNOT, f"apt-get cannot download {package} (stale package lists? as root, apt-get update)", tail(done.stderr))
    done = command("dpkg-deb", "-x", files[0], directory / "tree")
    if done.returncode != 0:
        raise LabError(EXIT_CANNOT, f"dpkg-deb cannot unpack {files[0].name}", tail(done.stderr))
    return directory / "tree"


def collect_kernel(tree, release, place):
    """Copies vmlinuz and the wanted modules, uncompressed, with the order in which they load."""
    (place / "modules").mkdir(parents=True)
    shutil.copyfile(tree / "boot" / f"vmlinuz-{release}", place / "vmlinuz")
    files = {}
    for base in ("lib", "usr/lib"):
        for path in (tree / base / "modules" / release).rglob("*.ko*"):
            files[path.name.split(".ko")[0].replace("-", "_")] = path

    order = []

    def add(name):
        path = files.get(name.replace("-", "_"))
        if path is None or name in order:  # no file: built into the kernel
            return
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix != ".ko":
            raise LabError(EXIT_CANNOT, f"{path.name}: a compression that the lab does not know")
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for dependency in depends[1].decode("ascii").split(",") if depends and depends[1] else []:
            add(dependency)
        (place / "modules" / f"{name}.ko").write_bytes(data)
        order.append(name)

    for wanted in WANTED_MODULES:
        add(wanted)
    if "kvm-amd" not in order:
        raise LabError(EXIT_CANNOT, f"the package of Linux {release} has no kvm-amd module")
    (place / "modules" / "order").write_text("".join(f"{name}\n" for name in order), encoding="ascii")


def find_busybox(scratch):
    """The installed busybox if it is static, else the one of busybox-static, unpacked and not installed."""
    installed = shutil.which("busybox")
    if installed and elf_problem(pathlib.Path(installed)) is None:
        return installed
    say("fetching busybox-static (apt-get download)")
    tree = unpack_package(scratch, "busybox-static")
    for place in ("bin/busybox", "usr/bin/busybox"):
        if (tree / place).is_file():
            return tree / place
    raise LabError(EXIT_CANNOT, "the package busybox-static has no busybox")


def find_binary(given):
    if given is None and os.environ.get("STALEMATE_LAB_BINARY"):
        given = pathlib.Path(os.environ["STALEMATE_LAB_BINARY"])
    if given is None:
        return build_stalemate()
    if not given.is_file():
        raise LabError(EXIT_USAGE, f"no such program: {given}")
    problem = elf_problem(given)
    if problem:
        raise LabError(EXIT_USAGE, f"{given} {problem}; the lab has no shared libraries: link it statically (-Ctarget-feature=+crt-static)")
    return given.resolve()


def elf_problem(path):
    """None for a statically linked x86-64 program, else what it is instead."""
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", header, 18)[0] != 62:
            return "is not an x86-64 ELF program"
        table, entry_size, entries = struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry_size * entries)
    pt_interp = 3
    kinds = [struct.unpack_from("<I", segments, at)[0] for at in range(0, len(segments), entry_size)]
    return "is dynamically linked" if pt_interp in kinds else None


def build_stalemate():
    if not shutil.which("cargo"):
        raise LabError(EXIT_CANNOT, "cargo is missing: install Rust, or give a statically linked stalemate with --binary")
    target_dir = PROJECT / "target" / "lab"
    say("building stalemate, statically linked (cargo build, target/lab)")
    environment = {k: v for k, v in os.environ.items() if k != "CARGO_ENCODED_RUSTFLAGS"}  # it would win over RUSTFLAGS
    environment["RUSTFLAGS"] = f"{os.environ.get('RUSTFLAGS', '')} -Ctarget-feature=+crt-static".strip()
    words = ["cargo", "build", "--release", "-p", "vmm", "--bin", "stalemate", "--target", TARGET, "--target-dir", str(target_dir)]
    done = subprocess.run(
        words + (["--quiet"] if Speech.quiet else []), cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=2, check=False
    )
    if done.returncode != 0:
        raise LabError(EXIT_LAB_DIED, f"stalemate does not build; try: {shlex.join(words)}")
    return target_dir / TARGET / "release" / "stalemate"
