"""Torch files put together by hand, with faults: pickles of chosen opcodes, and zip files that lie."""

import io
import struct
import zipfile
from collections.abc import Mapping


def text(value: str) -> bytes:
    """A str."""
    data = value.encode()
    return b"X" + struct.pack("<L", len(data)) + data


def number(value: int) -> bytes:
    """An int."""
    return (
        b"J" + struct.pack("<l", value)
        if abs(value) < 2**31
        else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    )


def numbers(*values: int) -> bytes:
    """A tuple of ints."""
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    """A name of a module's attribute."""
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def storage(key: str = "0", numel: int = 6, kind: str = "torch.FloatStorage") -> bytes:
    """A storage of the file."""
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(
    made: bytes | None = None,
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
    offset: int = 0,
    more: bytes = b"",
) -> bytes:
    """A tensor, of a storage."""
    parts = storage() if made is None else made
    return (
        named("torch._utils._rebuild_tensor_v2")
        + b"("
        + parts
        + number(offset)
        + shape
        + strides
        + b"\x89N"
        + more
        + b"tR"
    )


def pickled(value: bytes, name: str = "w") -> bytes:
    """A state dict of one value."""
    return b"\x80\x02}" + text(name) + value + b"s."


def zipped(
    pickle: bytes, storages: Mapping[str, bytes] | None = None, compress: str = "", order: bytes = b"little"
) -> bytes:
    """A torch file; the member that is named in ``compress`` is deflated."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        members = {"data.pkl": pickle, "byteorder": order}
        members |= {f"data/{key}": data for key, data in ({"0": bytes(24)} if storages is None else storages).items()}
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if name == compress else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(f"a/{name}"), data, kind)
    return out.getvalue()


def change(data: bytes, member: str, at: int, form: str, value: int) -> bytes:
    """A zip file with a field of a member's central entry changed."""
    name = f"a/{member}".encode()
    where = data.rindex(name) - 46
    assert data[where : where + 4] == b"PK\1\2"
    return data[: where + at] + struct.pack(form, value) + data[where + at + struct.calcsize(form) :]


def end(data: bytes, at: int, form: str, value: int) -> bytes:
    """A zip file with a field of its end changed."""
    where = len(data) - 22 + at
    return data[:where] + struct.pack(form, value) + data[where + struct.calcsize(form) :]
