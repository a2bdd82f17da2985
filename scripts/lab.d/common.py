"""What every part of the lab uses: its exit codes, its two ways to end early, and how it speaks to the user."""

import contextlib
import os
import pathlib

# Exit codes of the lab itself. Every other code is stalemate's own.
EXIT_USAGE = 2
EXIT_CANNOT = 3  # this host lacks something, or the lab did not boot
EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_LAB_DIED = 125  # the lab ended, or failed at its own part, after stalemate was started

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent
PROJECT = SCRIPTS.parent


class LabError(Exception):
    """Ends the lab with a message for the user and an exit code."""

    def __init__(self, code, message, detail=""):
        super().__init__(message)
        self.code = code
        self.detail = detail


class LabHung(LabError):
    """The lab's Linux shows no sign of life: QEMU's fault, not the job's (docs/lab.md)."""

    def __init__(self, message, has_spoken):
        super().__init__(EXIT_LAB_DIED, message)
        self.has_spoken = has_spoken


class Interrupted(BaseException):
    """A signal asked us to stop; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


class Speech:
    """Whether `say` is silent."""

    quiet = False


def say(text):
    """One line on stderr for a step; --quiet silences it."""
    if not Speech.quiet:
        complain(text)


def complain(text):
    """One line on stderr that --quiet does not silence."""
    with contextlib.suppress(OSError):
        os.write(2, f"lab: {text}\n".encode(errors="replace"))


def complain_block(text):
    with contextlib.suppress(OSError):
        os.write(2, "".join(f"  | {line}\n" for line in text.splitlines()).encode(errors="replace"))


def tail(text, lines=10):
    return "\n".join(text.strip().splitlines()[-lines:])
