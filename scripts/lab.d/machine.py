"""The machine: QEMU from start to end, and the three streams that come out of it. Leaves no process behind."""

import contextlib
import ctypes
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import time

from common import EXIT_CANNOT, EXIT_LAB_DIED, EXIT_TIMEOUT, LabError, LabHung, complain, say, tail

SILENCE_LIMIT_S = 30  # the lab says "alive" every 2 s while the job runs
BOOT_LIMIT_S = 120  # far above the 2 to 3 s it takes: a loaded machine is slow, not broken
CPU_MODEL = "max,+svm,+npt"
CONSOLE_TAIL_LINES = 30


class MarkedStream:
    """One virtio-serial port: hands on what arrives until the end mark, and never a part of the mark."""

    def __init__(self, end_mark, sink):
        self.mark = b"\0" + end_mark.encode("ascii") + b"\n"
        self.sink = sink
        self.held = b""
        self.ended = False

    def feed(self, data):
        if self.ended:
            return
        data = self.held + data
        at = data.find(self.mark)
        if at >= 0:
            self.ended = True
            data, self.held = data[:at], b""
        else:
            keep = next((n for n in range(min(len(data), len(self.mark) - 1), 0, -1) if data.endswith(self.mark[:n])), 0)
            data, self.held = data[: len(data) - keep], data[len(data) - keep :]
        if data:
            self.sink(data)


class Machine:
    """QEMU from start to end. Whatever happens, `run` leaves no process behind."""

    def __init__(self, work, kernel, job, options):
        self.work = work
        self.kernel = kernel
        self.job = job
        self.options = options
        self.started = self.ready = self.finished = None  # time.monotonic(), seconds
        self.last_sign = None  # time.monotonic() of the last line on the control channel
        self.has_spoken = False  # whether anything was written to stdout
        self.exit_code = None
        self.control_line = b""
        self.files = None

    def run(self):
        """Stalemate's exit code; its output has been passed on and its results are in files.cpio."""
        host_ends, lab_ends = zip(*(socket.socketpair() for _ in range(3)))
        with contextlib.ExitStack() as stack:
            for end in host_ends + lab_ends:
                stack.enter_context(end)
            self.files = stack.enter_context(open(self.work / "files.cpio", "wb"))
            qemu_log = stack.enter_context(open(self.work / "qemu.log", "wb"))
            words = self.qemu_command([end.fileno() for end in lab_ends])
            (self.work / "qemu-command").write_text(shlex.join(words) + "\n", encoding="utf-8", errors="surrogateescape")
            self.started = time.monotonic()
            qemu = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=qemu_log,
                stderr=subprocess.STDOUT,
                pass_fds=[end.fileno() for end in lab_ends],
                start_new_session=True,  # Ctrl-C is ours to handle
                preexec_fn=die_with_parent,
            )
            try:
                for end in lab_ends:
                    end.close()
                self.follow(host_ends)
            finally:
                qemu.kill()
                qemu.wait()
        return self.exit_code

    def qemu_command(self, fds):
        words = ["qemu-system-x86_64", "-name", f"stalemate-lab-{os.getpid()}"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc"]
        words += ["-accel", f"tcg,thread={self.options.tcg}", "-cpu", CPU_MODEL, "-smp", str(self.options.cpus), "-m", f"{self.options.memory}M"]
        words += ["-kernel", str(self.kernel.directory / "vmlinuz"), "-initrd", str(self.work / "initramfs")]
        words += ["-append", "console=ttyS0 panic=-1 stalemate.lab=1"]
        console = str(self.work / "console.log").replace(",", ",,")  # QEMU's way to write a comma
        words += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
        words += ["-device", "virtio-serial-pci"]
        for number, (name, fd) in enumerate(zip(("stdout", "stderr", "control"), fds), start=1):
            words += ["-chardev", f"socket,id={name},fd={fd}", "-device", f"virtserialport,chardev={name},nr={number},name={name}"]
        return words

    def follow(self, ends):
        """Passes the streams on until all three have ended, the machine is gone, or the time is up."""
        sinks = (self.on_stdout, lambda data: write_all(2, data), self.on_control)
        streams = [MarkedStream(self.job.end_mark, sink) for sink in sinks]
        with selectors.DefaultSelector() as selector:
            for end, stream in zip(ends, streams):
                selector.register(end, selectors.EVENT_READ, stream)
            while not all(stream.ended for stream in streams):
                left = self.seconds_left()
                if left <= 0:
                    raise self.time_is_up()
                silence_left = self.silence_left()
                if silence_left <= 0:
                    raise self.hung()
                for key, _ in selector.select(min(left, silence_left)):
                    try:
                        data = key.fileobj.recv(1 << 16)
                    except ConnectionResetError:
                        data = b""
                    if data:
                        key.data.feed(data)
                    else:
                        selector.unregister(key.fileobj)
                if not selector.get_map():
                    break
        if not all(stream.ended for stream in streams):
            raise self.died()
        self.files.flush()

    def on_stdout(self, data):
        self.has_spoken = True
        write_all(1, data)

    def on_control(self, data):
        """Lines "ready", "alive" and "exit CODE", then "files" and the archive."""
        while data and self.control_line != b"files\n":
            line, newline, data = data.partition(b"\n")
            self.control_line += line + newline
            if not newline:
                return
            word, *rest = self.control_line.split()
            self.last_sign = time.monotonic()
            if word == b"ready":
                self.ready = time.monotonic()
                say(f"booted in {self.ready - self.started:.1f} s; running {self.job.command.removeprefix('/lab/bin/')}")
            elif word == b"exit":
                self.finished = time.monotonic()
                self.exit_code = int(rest[0])
            if word != b"files":
                self.control_line = b""
        self.files.write(data)

    def seconds_left(self):
        now = time.monotonic()
        limit = self.options.timeout if self.ready else min(self.options.timeout, BOOT_LIMIT_S)
        return self.started + limit - now

    def silence_left(self):
        if self.ready is None or self.finished is not None:
            return SILENCE_LIMIT_S
        return self.last_sign + SILENCE_LIMIT_S - time.monotonic()

    def hung(self):
        return LabHung(f"the lab's Linux has shown no sign of life for {SILENCE_LIMIT_S} s (docs/lab.md, Troubleshooting)", self.has_spoken)

    def time_is_up(self):
        if self.ready:
            return LabError(EXIT_TIMEOUT, f"timeout: {self.job.name} was still running after {self.options.timeout} s; give --timeout more")
        if self.options.timeout < BOOT_LIMIT_S:
            return LabError(EXIT_TIMEOUT, f"timeout: the lab was still booting after {self.options.timeout} s", self.last_words())
        return LabError(EXIT_CANNOT, f"the lab failed to boot: nothing after {BOOT_LIMIT_S} s", self.last_words())

    def died(self):
        if self.ready is None:
            return LabError(EXIT_CANNOT, "the lab failed to boot; the end of its console:", self.last_words())
        return LabError(EXIT_LAB_DIED, f"the lab died while {self.job.name} was running; the end of its console:", self.last_words())

    def console(self):
        try:
            return (self.work / "console.log").read_text(encoding="utf-8", errors="replace").replace("\r", "")
        except OSError:
            return ""

    def last_words(self):
        qemu_log = (self.work / "qemu.log").read_text(encoding="utf-8", errors="replace")
        return tail(self.console(), CONSOLE_TAIL_LINES) + ("\nQEMU: " + tail(qemu_log) if qemu_log.strip() else "")

    def report(self, code, written):
        ending = f"exited with {code}"
        if code > 128 and code - 128 in {int(s) for s in signal.Signals}:
            ending = f"was ended by {signal.Signals(code - 128).name}"
        files = f"; {len(written)} file{'s' if len(written) > 1 else ''} came back: {shorten(written)}" if written else ""
        say(f"{self.job.name} {ending} after {self.finished - self.ready:.1f} s{files}")
        console = self.console()
        if "Out of memory: Killed process" in console:
            complain("the lab ran out of memory: give --memory more")
        trouble = re.search(r"^.*(BUG: |Oops: |WARNING: CPU|general protection fault|rcu: INFO: ).*$", console, re.MULTILINE)
        if trouble:
            complain(f"the lab's Linux complained (--keep keeps its console): {trouble[0].strip()}")


def die_with_parent():
    """In the child: even if the lab is killed by SIGKILL, QEMU goes with it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def write_all(fd, data):
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # a caller may have left the descriptor non-blocking
            with selectors.DefaultSelector() as selector:
                selector.register(fd, selectors.EVENT_WRITE)
                selector.select()


def shorten(paths, shown=4):
    names = [str(path) for path in paths[:shown]]
    return ", ".join(names) + (f" and {len(paths) - shown} more" if len(paths) > shown else "")
