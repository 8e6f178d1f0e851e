"""Filesystems to cut off, freeze, fill and turn read-only: loop images with ext4, and small tmpfs."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# _IOR('X', 125, __u32) of ext4's and XFS's headers; flag 2 (NOLOGFLUSH): not even the journal gets out.
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_PATIENCE_S = 30.0


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _must(*command: str) -> None:
    done = _run(*command)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")


def require_tools(*programs: str) -> None:
    """Skip, by name, what needs root or a program that is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")


class Disk:
    """A mounted filesystem of its own. Whoever freezes it thaws it before anything else."""

    def __init__(self, mount: Path, image: Path | None, options: str) -> None:
        self.mount, self._image, self._options = mount, image, options
        self._frozen = False

    @property
    def free_bytes(self) -> int:
        """For ordinary users."""
        status = os.statvfs(self.mount)
        return status.f_bavail * status.f_frsize

    def attach(self) -> None:
        """Mount it; skips where that is not allowed."""
        kind = ("tmpfs", "none") if self._image is None else ("ext4", str(self._image))
        done = _run("mount", "-t", kind[0], "-o", self._options, kind[1], str(self.mount))
        if done.returncode != 0:
            pytest.skip(f"may not mount here: {done.stderr.strip()}")

    def detach(self) -> None:
        """Unmount, as soon as the last process has let go."""
        self.thaw()
        deadline = time.monotonic() + _PATIENCE_S
        while _run("umount", str(self.mount)).returncode != 0:
            if time.monotonic() > deadline:
                holders = _run("fuser", "-vm", str(self.mount)).stderr if shutil.which("fuser") else ""
                _must("umount", "-l", str(self.mount))
                raise AssertionError(f"somebody kept {self.mount} busy: {holders}")
            time.sleep(0.02)
        # A process with its own copy of the mounts holds the filesystem a while longer, a cut one too.
        while self._image is not None and _run("losetup", "-j", str(self._image)).stdout:
            if time.monotonic() > deadline:
                raise AssertionError(f"somebody kept the device of {self._image} busy")
            time.sleep(0.02)

    def cut(self) -> None:
        """Power cut: from now on nothing reaches the image any more, and every call fails."""
        descriptor = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
        except OSError as error:
            pytest.skip(f"this kernel does not shut ext4 down on request: {error}")
        finally:
            os.close(descriptor)

    def is_cut(self) -> bool:
        """Whether a write fails now: proof that the cut has happened."""
        try:
            (self.mount / "probe").write_bytes(b"x")
        except OSError:
            return True
        return False

    def turn_read_only(self) -> None:
        """What ext4 does after an error: it turns read-only, whoever has files open."""
        for line in Path("/proc/mounts").read_text().splitlines():
            device, mount, *_ = line.split()
            if mount == str(self.mount):
                trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
                if not trigger.exists():
                    pytest.skip(f"this kernel has no {trigger}")
                trigger.write_text("made by a test")
                return
        raise AssertionError(f"{self.mount} is not mounted")

    def freeze(self) -> None:
        """Every write blocks, in the kernel, until `thaw`."""
        _must("fsfreeze", "-f", str(self.mount))
        self._frozen = True

    def thaw(self) -> None:
        """Let writes go on; idempotent."""
        if self._frozen:
            self._frozen = False
            _must("fsfreeze", "-u", str(self.mount))

    def fill(self, leave_bytes: int = 0) -> Path:
        """Take all space but ``leave_bytes`` by one file, and return it."""
        ballast = self.mount / "ballast"
        with ballast.open("wb", buffering=0) as file:
            block = b"\1" * 65536
            try:
                while self.free_bytes > leave_bytes + len(block):
                    file.write(block)
                while leave_bytes == 0:
                    file.write(block[:4096])
            except OSError:
                pass
            os.fsync(file.fileno())
        return ballast


@contextmanager
def ext4(folder: Path, megabytes: int = 64, options: str = "loop,errors=remount-ro") -> Iterator[Disk]:
    """A loop image with ext4, mounted at ``folder/mount``."""
    require_tools("mkfs.ext4", "mount", "losetup")
    image, mount = folder / "image", folder / "mount"
    mount.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    _must("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    disk = Disk(mount, image, options)
    disk.attach()
    try:
        yield disk
    finally:
        disk.detach()
        image.unlink()


@contextmanager
def tmpfs(folder: Path, megabytes: int = 6) -> Iterator[Disk]:
    """A filesystem in memory, mounted at ``folder/mount``."""
    require_tools("mount")
    mount = folder / "mount"
    mount.mkdir(parents=True)
    disk = Disk(mount, None, f"size={megabytes}m")
    disk.attach()
    try:
        yield disk
    finally:
        disk.detach()
