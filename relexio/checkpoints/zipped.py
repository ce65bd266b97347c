"""Where the members of a zip file lie: only files whose members are stored as they are, as torch writes them.

``zipfile`` is not used: it reads a directory of any size, and decompresses. What is read here is bounded, and the
members that come back lie inside the file, and apart.
"""

import os
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from relexio.errors import CheckpointError, IncompleteError

_MAX_DIRECTORY, _MAX_MEMBERS = 64 << 20, 500_000
_NEAR = 4096  # bytes at either end that are read at once: in a file of one tensor, all but its bytes
_END, _END64, _LOCATOR, _CENTRAL, _LOCAL = (b"PK" + code for code in (b"\5\6", b"\6\6", b"\6\7", b"\1\2", b"\3\4"))
_CUT = "truncated, or still being written; copy the file again"

#: Reads bytes of the file: at a place, so many.
Reader = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A stored member: where its bytes begin in the file, and how many there are."""

    start: int
    size: int


class _Entry(NamedTuple):
    name: bytes
    header: int
    size: int


def members_of(fd: int, start: int, size: int) -> dict[str, Member]:
    """The members of the zip file in these bytes of a file, by name. Raises CheckpointError (which names no file)."""

    ends = [(at, os.pread(fd, min(_NEAR, size - at), start + at)) for at in (0, max(size - _NEAR, 0))]

    def read(at: int, count: int) -> bytes:
        for first, near in ends:
            if first <= at and at + count <= first + len(near):
                return near[at - first : at - first + count]
        data = os.pread(fd, count, start + at) if 0 <= at <= at + count <= size else b""
        if len(data) != count:
            raise IncompleteError(_CUT)
        return data

    if hasattr(os, "posix_fadvise"):  # headers are far apart: nothing is to be read ahead
        os.posix_fadvise(fd, start, size, os.POSIX_FADV_RANDOM)
    entries, directory = _directory(read, size)
    spans = sorted((entry.header, *_data(read, entry), entry.name) for entry in entries)
    for before, after in pairwise((*spans, (directory, directory, directory, b"the directory"))):
        if before[2] > after[0]:
            raise CheckpointError(f"{_shown(before[3])} and {_shown(after[3])} overlap in the file")
    table = {name.decode(): Member(start + begin, end - begin) for _, begin, end, name in spans}
    if len(table) != len(entries):
        raise CheckpointError("two of its members have the same name")
    return table


def _directory(read: Reader, size: int) -> tuple[list[_Entry], int]:
    """The entries of the central directory, and where it begins."""
    end = size - 22
    fields = struct.unpack("<4s4H2LH", read(end, 22))
    if fields[0] != _END or fields[7]:
        raise IncompleteError(_CUT)
    count, length, begin = fields[4:7]
    if 0xFFFF in fields[1:5] or 0xFFFFFFFF in fields[5:7]:
        signature, _, end, _ = struct.unpack("<4sLQL", read(end - 20, 20))
        large = struct.unpack("<4sQ2H2L4Q", read(end, 56))
        if signature != _LOCATOR or large[0] != _END64:
            raise IncompleteError(_CUT)
        count, length, begin = large[7:10]
    if begin + length > end:  # torch leaves a second end, for large files, between the two
        raise CheckpointError("its directory is not where its end says; copy the file again")
    if length > _MAX_DIRECTORY or count > _MAX_MEMBERS:
        raise CheckpointError(f"has {count:,} members, more than any model's file")
    return _entries(read(begin, length), count), begin


def _entries(data: bytes, count: int) -> list[_Entry]:
    entries, at = [], 0
    for _ in range(count):
        if len(data) - at < 46:
            raise CheckpointError("its directory is damaged; copy the file again")
        fields = struct.unpack_from("<4s6H3L5H2L", data, at)
        signature, flags, method, compressed, size = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        name = data[at + 46 : at + 46 + name_length]
        if signature != _CENTRAL:
            raise CheckpointError("its directory is damaged; copy the file again")
        extra = data[at + 46 + name_length : at + 46 + name_length + extra_length]
        size, compressed, header = _large(extra, (size, compressed, header))
        if flags & 1 or method or size != compressed:
            raise CheckpointError(
                f"{_shown(name)} is compressed or encrypted, as torch writes none; save it again with torch"
            )
        entries.append(_Entry(name, header, size))
        at += 46 + name_length + extra_length + comment_length
    if at != len(data):
        raise CheckpointError("its directory is damaged; copy the file again")
    return entries


def _large(extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
    """The fields of an entry, those of 64 bits from its extra data."""
    at = 0
    while 0xFFFFFFFF in fields and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and length >= 8 * fields.count(0xFFFFFFFF) and at + 4 + length <= len(extra):
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return tuple(next(values) if field == 0xFFFFFFFF else field for field in fields)
        at += 4 + length
    return fields


def _data(read: Reader, entry: _Entry) -> tuple[int, int]:
    """Where the bytes of a member begin and end, which its local header tells."""
    header = read(entry.header, 30 + len(entry.name))
    signature, method = header[:4], header[8:10]
    name_length, extra_length = struct.unpack_from("<2H", header, 26)
    if signature != _LOCAL or method != b"\0\0" or name_length != len(entry.name) or header[30:] != entry.name:
        raise CheckpointError(f"{_shown(entry.name)} is not where the directory says; copy the file again")
    begin = entry.header + 30 + name_length + extra_length
    return begin, begin + entry.size


def _shown(name: bytes) -> str:
    return name[:80].decode(errors="replace")
