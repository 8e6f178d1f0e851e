"""Members of an exported ZIP as arrays over a memory map, checked before they are believed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ml_debugger.errors import CorruptDataError, NotFoundError, StorageError
from ml_debugger.path_argument import check_path
from ml_debugger.trace.dtypes import Array

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_MAX_NPY_HEADER_BYTES = 4096
_REMEDY = "export the trace again"


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of an npy file, read from ``file``, which is behind its header then.

    Raises:
        ValueError: It is none of version 1.0.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its npy version is not 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        raise
    except Exception as error:  # numpy takes Python's tokenizer and parser, which have many of their own
        raise ValueError(f"its npy header cannot be parsed: {error}") from error
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran_order, dtype


class ExportArchive:
    """The members of one ZIP, mapped into memory; each is verified by the manifest when it is first used.

    Raises:
        NotFoundError: No such file.
        InvalidTypeError: Not a path.
        InvalidInputError: No name that a file could have.
        CorruptDataError: Not an export.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Absolute, since copies in other processes open it anew, wherever they run.
        self.path = Path(os.path.abspath(check_path(path, "path", "an export")))
        self._arrays: dict[str, Array] = {}
        try:
            with self.path.open("rb") as file:
                self._infos = self._list(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise NotFoundError(f"no export at {self.path}", "check the path") from error
        except (zipfile.BadZipFile, UnicodeDecodeError, struct.error, NotImplementedError, EOFError) as error:
            raise self.damaged(f"it is no ZIP: {error}") from error
        except ValueError as error:  # mmap of an empty file
            raise self.damaged(str(error)) from error
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot read {self.path}: {error.strerror or error}", "check its permissions"
            ) from error
        self.manifest = self._read_manifest()

    def array(self, name: str) -> Array:
        """A member's array, read-only, over the memory map.

        Raises:
            CorruptDataError: The member is missing, no npy, or not what the manifest says.
        """
        found = self._arrays.get(name)
        if found is None:
            found = self._arrays[name] = self._decode(name, self._verified(name))
        return found

    def member(self, name: str) -> memoryview:
        """A member's bytes, over the memory map.

        Raises:
            CorruptDataError: The member is missing, or not what the manifest says.
        """
        return self._verified(name)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def damaged(self, problem: str) -> CorruptDataError:
        """The error for a file that is not what an export writes."""
        return CorruptDataError(f"{self.path} is not an intact export: {problem}", _REMEDY)

    def _list(self, file: Any) -> dict[str, zipfile.ZipInfo]:
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise self.damaged("two members have one name")
        return infos

    def _member(self, name: str) -> memoryview:
        info = self._infos.get(name)
        if info is None:
            raise self.damaged(f"it has no member {name!r}")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.file_size != info.compress_size
            or info.flag_bits & 1
        ):
            raise self.damaged(f"member {name!r} is compressed or encrypted, expected stored")
        end = info.header_offset + _LOCAL_HEADER.size
        if info.header_offset < 0 or end > len(self._map):
            raise self.damaged(f"member {name!r} lies outside the file")
        header = _LOCAL_HEADER.unpack(self._map[info.header_offset : end])
        start = end + header[-2] + header[-1]
        if header[0] != _LOCAL_SIGNATURE or start + info.file_size > len(self._map):
            raise self.damaged(f"member {name!r} lies outside the file")
        return memoryview(self._map)[start : start + info.file_size]

    def _verified(self, name: str) -> memoryview:
        member = self._member(name)
        expected = self.manifest["members"].get(name)
        if not isinstance(expected, dict) or expected.get("bytes") != len(member):
            raise self.damaged(f"member {name!r} has {len(member)} bytes, the manifest says {expected!r}")
        if hashlib.sha256(member).hexdigest() != expected.get("sha256"):
            raise self.damaged(f"member {name!r} has another SHA-256 than the manifest says")
        return member

    def _decode(self, name: str, member: memoryview) -> Array:
        head = io.BytesIO(member[:_MAX_NPY_HEADER_BYTES])
        try:
            shape, fortran_order, dtype = npy_header(head)
        except ValueError as error:
            raise self.damaged(f"member {name!r} is no npy: {error}") from error
        count = math.prod(shape)
        if dtype.hasobject or fortran_order or count * dtype.itemsize != len(member) - head.tell():
            raise self.damaged(f"member {name!r} has {len(member)} bytes for shape {shape} of {dtype}")
        if not count:
            return np.empty(shape, dtype)
        return np.frombuffer(member, dtype, count, head.tell()).reshape(shape)

    def _read_manifest(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(bytes(self._member(MANIFEST_NAME)))
            version = document["format_version"]
            well_formed = isinstance(document["members"], dict) and isinstance(document["tables"], dict)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(
                f"its {MANIFEST_NAME} cannot be read ({type(error).__name__}: {error})"
            ) from error
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise CorruptDataError(
                f"{self.path} has format version {version!r}, expected at most {FORMAT_VERSION}",
                "upgrade ml-debugger",
            )
        if not well_formed:
            raise self.damaged(f"its {MANIFEST_NAME} lists no tables or members")
        return document
