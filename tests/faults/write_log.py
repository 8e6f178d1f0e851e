"""What a process does to its files, call by call, and the disks that a power cut could have left of it.

The log is strace's. The model of a filesystem: bytes that are not synced yet reach the disk or not, in any
order and torn at sectors or pages; what happens to directories gets there in order, as in a journal, or by an
fsync of the directory. A crash may come between any two calls, or in the middle of one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from injection import Attached

_CALLS = (
    "openat,close,write,pwrite64,pwritev,fallocate,ftruncate,fsync,fdatasync,mkdir,rmdir,rename,link,unlink,"
    "access,faccessat,faccessat2"
)
_SYNCS = ("fsync", "fdatasync")
_LINE = re.compile(r"(\d+\.\d+) (\w+)\((.*)\) += (-?\d+)(?:<[^>]*>)?(?: .*)? <(\d+\.\d+)>$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(\d+)<((?:[^>\\]|\\.)*)>")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_PARTS_A_TEAR = (512, 4096)


def _decoded(text: str) -> bytes:
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), text.encode("ascii"))


@dataclass(frozen=True)
class Operation:
    """One system call that has succeeded."""

    name: str
    paths: tuple[str, ...] = ()  # absolute
    data: bytes = b""
    offset: int = -1
    size: int = 0
    flags: str = ""
    descriptor: int = -1


class WriteLog(Attached):
    """Logs a stopped process, all its threads, until the context ends.

    Args:
        target: Process id.
        folder: Of the logs; a thread has one each.
    """

    def __init__(self, target: int, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        options = ["-ff", "-y", "-ttt", "-T", "-xx", "-s", str(64 << 20), "-o", str(folder / "log")]
        super().__init__(target, [*options, "-e", f"trace={_CALLS}"])

    def operations(self) -> list[Operation]:
        """In the order in which they took effect: a sync when it returned, another call when it began."""
        lines: list[tuple[float, Operation]] = []
        for path in sorted(self._folder.iterdir()):
            for line in path.read_text("ascii").splitlines():
                found = _LINE.match(line)
                if found is None or (int(found[4]) < 0 and "access" not in found[2]):
                    continue
                begin, name, result = float(found[1]), found[2], int(found[4])
                when = begin + float(found[5]) if name in _SYNCS else begin
                lines.append((when, _parsed(name, found[3], result)))
        lines.sort(key=lambda entry: entry[0])
        return [operation for _, operation in lines]


def _parsed(name: str, arguments: str, result: int) -> Operation:
    texts = [_decoded(found[1]) for found in _STRING.finditer(arguments)]
    if name in ("openat", "mkdir", "rmdir", "rename", "link", "unlink") or "access" in name:
        paths = tuple(text.decode() for text in texts)
        return Operation(name, paths, flags=arguments.rpartition('"')[2], descriptor=result)
    target = _DESCRIPTOR.match(arguments)
    if target is None:  # a descriptor of no file
        return Operation("nothing")
    numbers = [int(number) for number in re.findall(r", (\d+)(?=,|$)", arguments)]
    paths = (_decoded(target[2]).decode(),)
    if name in ("write", "pwrite64", "pwritev"):
        data = b"".join(texts)[:result]
        offset = -1 if name == "write" else numbers[-1]
        return Operation(name, paths, data, offset, descriptor=int(target[1]))
    size = sum(numbers[-2:]) if name == "fallocate" else numbers[-1] if numbers else 0
    return Operation(name, paths, size=size, descriptor=int(target[1]))


@dataclass
class _Write:
    offset: int  # -1: the file gets the length `size`; -2: at least that length
    data: bytes = b""
    size: int = 0
    synced: bool = False


@dataclass
class _File:
    writes: list[_Write] = field(default_factory=list)
    end: int = 0  # of what was appended by write(2)

    def content(self, choice: random.Random) -> tuple[bytes, int]:
        """With any of what is not synced, whole or torn; and how many writes are not there, or not whole."""
        content = bytearray()
        missing = 0
        mood = choice.random()  # else nearly every state has lost a bit of everything
        for write in self.writes:
            if not write.synced and choice.random() < mood:
                missing += 1
                continue
            if write.offset < 0:
                if write.offset == -1:
                    del content[write.size :]
                content.extend(bytes(max(write.size - len(content), 0)))
                continue
            parts = list(_torn(write, choice if not write.synced else None))
            missing += sum(len(part) for _, part in parts) < len(write.data)
            for begin, part in parts:
                content.extend(bytes(max(begin + len(part) - len(content), 0)))
                content[begin : begin + len(part)] = part
        return bytes(content), missing


def _torn(write: _Write, choice: random.Random | None) -> Iterator[tuple[int, bytes]]:
    if choice is None or choice.random() < 0.5:
        yield write.offset, write.data
        return
    step, share = choice.choice(_PARTS_A_TEAR), choice.random()
    end = write.offset + len(write.data)
    begin = write.offset
    while begin < end:
        stop = min((begin // step + 1) * step, end)
        if choice.random() < share:
            yield begin, write.data[begin - write.offset : stop - write.offset]
        begin = stop


@dataclass
class _Change:
    number: int  # among the changes of all directories
    removed: tuple[str, ...]
    added: tuple[tuple[str, _File | _Directory], ...]
    synced: bool = False


@dataclass
class _Directory:
    entries: dict[str, _File | _Directory] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)

    def durable(self, cut: int) -> dict[str, _File | _Directory]:
        """Its entries where the journal ends before the change with the number ``cut``."""
        entries: dict[str, _File | _Directory] = {}
        for change in self.changes:
            if change.synced or change.number < cut:
                for name in change.removed:
                    entries.pop(name, None)
                entries.update(change.added)
        return entries


class Replay:
    """The filesystem below ``root`` as the operations make it, one after another.

    Attributes:
        acknowledged: What the process has announced so far, as the parts of the path behind "/acknowledged".
    """

    def __init__(self, root: Path, acknowledged: str) -> None:
        self._root, self._marker = PurePosixPath(root), acknowledged
        self._top = _Directory()
        self._changes = self._missing = 0
        self._synced_descriptors: set[int] = set()
        self.acknowledged: list[list[str]] = []

    def apply(self, operation: Operation) -> None:
        """Let one more call happen, as far as the process sees it."""
        name, paths = operation.name, operation.paths
        if "access" in name:
            if paths and paths[0].startswith(self._marker):
                self.acknowledged.append(paths[0].split("/")[2:])
        elif name == "close":
            self._synced_descriptors.discard(operation.descriptor)
        elif paths and all(self._root in PurePosixPath(path).parents for path in paths):
            getattr(self, f"_{name}")(operation)
        elif paths and PurePosixPath(paths[0]) == self._root and name in _SYNCS:
            self._sync_directory(self._top)

    def materialize(self, target: Path, choice: random.Random, torn: Operation) -> int:
        """Make a disk that a power cut could leave now, in the middle of ``torn``.

        Returns:
            How many writes and changes of directories did not reach it, or not whole.
        """
        in_flight = self._write_of(torn)
        self._missing = 0
        try:
            cut = self._changes - int(choice.random() ** 2 * (self._changes + 1))
            self._make(self._top, target, cut, choice, {})
        finally:
            if in_flight is not None:
                in_flight.writes.pop()
        return self._missing

    def _write_of(self, operation: Operation) -> _File | None:
        if operation.name not in ("write", "pwrite64", "pwritev"):
            return None
        file = self._find(operation.paths[0])
        if not isinstance(file, _File):
            return None
        offset = file.end if operation.offset < 0 else operation.offset
        file.writes.append(_Write(offset, operation.data))
        return file

    def _make(
        self, directory: _Directory, path: Path, cut: int, choice: random.Random, made: dict[int, bytes]
    ) -> None:
        path.mkdir(mode=0o700)
        self._missing += sum(not change.synced and change.number >= cut for change in directory.changes)
        for name, node in directory.durable(cut).items():
            if isinstance(node, _Directory):
                self._make(node, path / name, cut, choice, made)
                continue
            if id(node) not in made:  # a file of two names is one file
                made[id(node)], missing = node.content(choice)
                self._missing += missing
            (path / name).write_bytes(made[id(node)])

    def _find(self, path: str) -> _File | _Directory | None:
        pure = PurePosixPath(path)
        if pure == self._root:
            return self._top
        if self._root not in pure.parents:
            return None
        node: _File | _Directory | None = self._top
        for part in pure.relative_to(self._root).parts:
            node = node.entries.get(part) if isinstance(node, _Directory) else None
        return node

    def _parent(self, path: str) -> tuple[_Directory, str]:
        pure = PurePosixPath(path)
        parent = self._find(str(pure.parent))
        assert isinstance(parent, _Directory), path
        return parent, pure.name

    def _change(
        self, directory: _Directory, removed: tuple[str, ...], *added: tuple[str, _File | _Directory]
    ) -> None:
        for name in removed:
            directory.entries.pop(name, None)
        directory.entries.update(added)
        directory.changes.append(_Change(self._changes, removed, added))
        self._changes += 1

    @staticmethod
    def _sync_directory(directory: _Directory) -> None:
        for change in directory.changes:
            change.synced = True

    def _openat(self, operation: Operation) -> None:
        path, flags = operation.paths[0], operation.flags
        self._synced_descriptors.discard(operation.descriptor)
        if "SYNC" in flags:
            self._synced_descriptors.add(operation.descriptor)
        node = self._find(path)
        if node is None and "O_CREAT" in flags:
            parent, name = self._parent(path)
            self._change(parent, (), (name, _File()))
        elif isinstance(node, _File) and "O_TRUNC" in flags:
            node.writes.append(_Write(-1))
            node.end = 0

    def _data(self, operation: Operation) -> None:
        file = self._find(operation.paths[0])
        if not isinstance(file, _File):  # it has been deleted
            return
        offset = operation.offset
        if offset < 0:
            offset, file.end = file.end, file.end + len(operation.data)
        synced = operation.descriptor in self._synced_descriptors
        file.writes.append(_Write(offset, operation.data, synced=synced))

    _write = _pwrite64 = _pwritev = _data

    def _fallocate(self, operation: Operation) -> None:
        file = self._find(operation.paths[0])
        if isinstance(file, _File):
            file.writes.append(_Write(-2, size=operation.size))

    def _ftruncate(self, operation: Operation) -> None:
        file = self._find(operation.paths[0])
        if isinstance(file, _File):
            file.writes.append(_Write(-1, size=operation.size))

    def _fsync(self, operation: Operation) -> None:
        node = self._find(operation.paths[0])
        if isinstance(node, _Directory):
            self._sync_directory(node)
        elif node is not None:
            for write in node.writes:
                write.synced = True

    _fdatasync = _fsync

    def _mkdir(self, operation: Operation) -> None:
        parent, name = self._parent(operation.paths[0])
        self._change(parent, (), (name, _Directory()))

    def _unlink(self, operation: Operation) -> None:
        parent, name = self._parent(operation.paths[0])
        self._change(parent, (name,))

    _rmdir = _unlink

    def _rename(self, operation: Operation) -> None:
        (source, old), (target, new) = map(self._parent, operation.paths)
        assert source is target, "a rename between directories"
        self._change(source, (old,), (new, source.entries[old]))

    def _link(self, operation: Operation) -> None:
        (source, old), (target, new) = map(self._parent, operation.paths)
        self._change(target, (), (new, source.entries[old]))
