"""What comes out of the lab: the files that the job wrote, put where the user expects them."""

import os
import pathlib
import stat
import tempfile

from common import EXIT_LAB_DIED, LabError


class Results:
    """Unpacks the lab's archive; trusts no name in it beyond the places that the job may write to."""

    def __init__(self, job, out):
        self.job = job
        self.out = out
        self.failures = []

    def unpack(self, archive):
        """The files written, as the user would name them."""
        written = []
        with open(archive, "rb") as file:
            for path, mode, data in read_cpio(file):
                target = self.target(path)
                if target is None:
                    continue
                try:
                    if stat.S_ISDIR(mode):
                        target.mkdir(parents=True, exist_ok=True)
                    elif stat.S_ISREG(mode):
                        replace_file(target, data, mode)
                        written.append(pathlib.Path(os.path.relpath(target)) if self.job.cwd in target.parents else target)
                except OSError as error:
                    self.failures.append(f"{target}: {error.strerror}")
        return written

    def target(self, name):
        path = pathlib.Path("/", name)
        if ".." in path.parts or not any(root == path or root in path.parents for root in self.job.roots):
            return None
        if self.out is not None and (path == self.job.cwd or self.job.cwd in path.parents):
            return self.job.cwd / self.out / path.relative_to(self.job.cwd)
        return path


def read_cpio(file):
    """(name, mode, data) of each entry of a `newc` archive."""
    while True:
        header = file.read(110)
        if len(header) < 110 or header[:6] != b"070701":
            raise LabError(EXIT_LAB_DIED, "the archive of results is damaged (did the lab run out of memory?)")
        fields = [int(header[at : at + 8], 16) for at in range(6, 110, 8)]
        mode, data_size, name_size = fields[1], fields[6], fields[11]
        name = os.fsdecode(file.read(name_size)[:-1])
        file.read(-(110 + name_size) % 4)
        if name == "TRAILER!!!":
            return
        data = file.read(data_size)
        file.read(-data_size % 4)
        if len(data) < data_size:
            raise LabError(EXIT_LAB_DIED, "the archive of results ends early")
        yield name, mode, data


def replace_file(target, data, mode):
    """Writes beside the target and renames: a reader sees the old file or the new one. A link is followed, not replaced."""
    target = pathlib.Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(0, "is a directory here")
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".lab-", delete=False) as file:
        try:
            file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), (mode & 0o777) & ~umask)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
