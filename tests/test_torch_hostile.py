"""Torch files that were made to harm: nothing in them is run, nothing hangs or fills the memory; each comes to one error."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from relexio.checkpoints import unpickle
from relexio.checkpoints.layout import open_checkpoint
from relexio.errors import CheckpointError, IncompleteError
from tests.support.torch_zip import change, end, named, number, numbers, pickled, storage, tensor, text, zipped

GOOD = zipped(pickled(tensor()), {"0": np.arange(6, dtype=np.float32).tobytes()})


def call(name: str, argument: bytes) -> bytes:
    return named(name) + b"(" + argument + b"tR"


def memoized(count: int, op: bytes) -> bytes:
    return b"".join(op + b"r" + struct.pack("<L", n) for n in range(count))


PICKLES: dict[str, tuple[bytes, str]] = {
    "a shell": (pickled(call("posix.system", text("touch EVIL"))), "posix.system"),
    "os.system": (pickled(call("os.system", text("touch EVIL"))), "os.system"),
    "eval": (pickled(call("builtins.eval", text("open('EVIL','w')"))), "builtins.eval"),
    "getattr": (pickled(named("builtins.getattr")), "builtins.getattr"),
    "a module's own import": (pickled(named("torch.serialization.os.system")), "torch.serialization.os.system"),
    "a known module, another name": (pickled(call("torch.load", text("x"))), "torch.load"),
    "a dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0aSize.__mro\x93.", "torch.Size.__mro"),
    "torch.hub": (pickled(call("torch.hub.load", text("x"))), "torch.hub.load"),
    "instance": (b"\x80\x02(S'touch EVIL'\nios\nsystem\n.", "opcode 0x53"),
    "inst": (b"\x80\x02(ios\nsystem\n.", "opcode 0x69"),
    "obj": (b"\x80\x02(" + named("torch.Size") + b"o.", "opcode 0x6f"),
    "extension": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "keywords": (b"\x80\x04" + named("torch.Size") + b")}\x92.", "opcode 0x92"),
    "protocol 0": (b"I1\n.", "opcode 0x49"),
    "a call of text": (b"\x80\x02" + text("posix.system") + b"(" + text("x") + b"tR.", "damaged"),
    "a call of a result": (b"\x80\x02" + call("torch.Size", b"") + b"(tR.", "damaged"),
    "state on a name": (b"\x80\x02" + named("torch.Size") + b"}b.", "damaged"),
    "state on a tuple": (b"\x80\x02)}b.", "damaged"),
    "items of a name": (b"\x80\x02" + named("torch.Size") + text("a") + b"Ns.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"), "nothing": (b"", "damaged"), "an empty stack": (b"\x80\x02.", "damaged"),
    "two values": (b"\x80\x02NN.", "damaged"), "a mark left": (b"\x80\x02N(.", "damaged"),
    "a mark too few": (b"\x80\x02t.", "damaged"), "beneath the mark": (b"\x80\x02N(R.", "damaged"),
    "protocol 9": (b"\x80\x09}.", "damaged"), "not UTF-8": (b"\x80\x02X\1\0\0\0\xff.", "damaged"),
    "a text of 4 GiB": (b"\x80\x02X\xff\xff\xff\xffab.", "damaged"),
    "a text of 2^63": (b"\x80\x04\x8d" + b"\xff" * 8 + b"ab.", "damaged"),
    "a frame past the end": (b"\x80\x04\x95", "damaged"),
    "a memo of 2^32": (b"\x80\x02Nr\xff\xff\xff\xff.", "damaged"), "what no memo has": (b"\x80\x02j\1\0\0\0.", "damaged"),
    "a name without end": (b"\x80\x02c" + b"a" * 9000, "damaged"),
    "marks in marks": (b"\x80\x02" + b"(" * 9000 + b".", "nested too deeply"),
    "a list of itself": (b"\x80\x02]q\0h\0a.", "no table"),
    "a table in itself": (b"\x80\x02}q\0X\1\0\0\0ah\0s.", "no plain tensor"),
    "a name twice": (b"\x80\x02}" + (text("w") + tensor() + b"s") * 2 + b".", "twice"),
    "a tuple as key": (b"\x80\x02})Ns.", "damaged"), "a deep key": (b"\x80\x02})" + b"\x85" * 90_000 + b"Ns.", "damaged"),
    "deep tuples": (pickled(b")" + b"\x85" * 300_000), "no plain tensor"),
    "deep parameters": (pickled(b"N" + (b"\x85" + b"R") * 5), "damaged"),
    "numbers as names": (b"\x80\x02}K\1" + tensor() + b"s.", "no names"), "an empty table": (b"\x80\x02}.", "no table"),
    "no storage": (pickled(tensor(b"N")), "no storage"),
    "another storage": (pickled(tensor(storage("9"))), "storage 9 is missing"),
    "a storage too long": (pickled(tensor(storage(numel=7))), "has 24 bytes and not 7"),
    "a storage below nothing": (pickled(tensor(storage(numel=-6))), "unknown kind"),
    "a storage of a class": (pickled(tensor(storage(kind="torch.Size"))), "unknown kind"),
    "past its storage": (pickled(tensor(offset=1)), "past the 6"), "before its storage": (pickled(tensor(offset=-1)), "offset"),
    "strides past it": (pickled(tensor(strides=numbers(4, 1))), "past the 6"),
    "strides below nothing": (pickled(tensor(strides=numbers(-3, 1))), "strides"),
    "a vast shape": (pickled(tensor(shape=numbers(2**62 - 1, 2**62 - 1), strides=numbers(0, 0))), "more elements"),
    "2^70": (pickled(tensor(shape=numbers(2**70), strides=numbers(1))), "shape"),
    "a shape of 9000": (pickled(tensor(shape=numbers(*[1] * 9000), strides=numbers(*[1] * 9000))), "shape"),
    "a shape and no strides": (pickled(tensor(strides=b")")), "different lengths"),
    "a shape that is text": (pickled(tensor(shape=text("abc"))), "shape"),
    "a size of True": (pickled(tensor(shape=b"\x88\x85")), "shape"),
    "conjugated": (pickled(tensor(more=b"}" + text("conj") + b"\x88s")), "conjugated"),
    "too many arguments": (pickled(tensor(more=b"NNN")), "conjugated"),
    "a broadcast": (pickled(tensor(shape=numbers(2**40, 3), strides=numbers(0, 1))), "order"),
}  # fmt: skip

ZIPS: dict[str, tuple[bytes, str]] = {
    "compressed storage": (zipped(pickled(tensor()), compress="data/0"), "a/data/0 is compressed"),
    "a bomb": (zipped(pickled(tensor(storage(numel=1 << 22))), {"0": bytes(1 << 24)}, "data/0"), "a/data/0 is compressed"),
    "compressed pickle": (zipped(pickled(tensor()) + bytes(1 << 20), compress="data.pkl"), "a/data.pkl is compressed"),
    "encrypted": (change(GOOD, "data/0", 8, "<H", 1), "encrypted"),
    "sizes that differ": (change(GOOD, "data/0", 20, "<L", 4), "compressed"),
    "a header elsewhere": (change(GOOD, "data/0", 42, "<L", 5), "not where the directory says"),
    "a header past the end": (change(GOOD, "data/0", 42, "<L", 1 << 30), "truncated"),
    "another's header": (change(GOOD, "data/0", 42, "<L", 0), "not where the directory says"),
    "a size past the end": (change(change(GOOD, "data/0", 24, "<L", 1 << 30), "data/0", 20, "<L", 1 << 30), "overlap"),
    "a size into the next": (change(change(GOOD, "data.pkl", 24, "<L", 999), "data.pkl", 20, "<L", 999), "overlap"),
    "a pickle of 1 GiB": (change(change(GOOD, "data.pkl", 24, "<L", 1 << 30), "data.pkl", 20, "<L", 1 << 30), "overlap"),
    "too many members": (end(GOOD, 10, "<H", 9), "damaged"), "too few": (end(GOOD, 10, "<H", 2), "damaged"),
    "a directory of 4 GiB": (end(GOOD, 12, "<L", 0xFFFFFFF0), "not where its end says"),
    "a directory elsewhere": (end(GOOD, 16, "<L", 0), "damaged"),
    "64 bits and none": (end(GOOD, 16, "<L", 0xFFFFFFFF), "truncated"),
    "a comment": (end(GOOD, 20, "<H", 1) + b"x", "truncated"), "cut": (GOOD[:-1], "truncated"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "its head": (GOOD[:4], "truncated"), "empty": (b"", "truncated"), "zeros": (bytes(9000), "truncated"),
    "no pickle": (zipped(b"").replace(b"data.pkl", b"data.pk_"), "no data.pkl"),
    "big-endian": (zipped(pickled(tensor()), order=b"big"), "big-endian"),
    "a bare pickle": (pickled(call("posix.system", text("touch EVIL"))), "not a file of torch.save"),
}  # fmt: skip


def twice() -> bytes:
    """Two members of one name."""
    made = zipped(pickled(tensor()), {"0": bytes(24), "1": bytes(24)})
    return made.replace(b"a/data/1", b"a/data/0")


def shared_bytes() -> bytes:
    """Two storages at one place: the second's local header lies in the bytes of the first, which is a quine's way."""
    inner = b"PK\3\4" + bytes(22) + struct.pack("<2H", 8, 0) + b"a/data/1" + bytes(8)
    made = zipped(pickled(tensor()), {"0": inner, "1": bytes(8)})
    return change(made, "data/1", 42, "<L", made.index(inner))


ZIPS |= {"two of one name": (twice(), "same name"), "storages that overlap": (shared_bytes(), "overlap")}


def attempt(tmp_path: Path, data: bytes, name: str) -> str:
    """What is said of a file; within a second or two, and with little memory."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_bytes(data)
    began = time.process_time()  # whatever else the machine does
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path / "c")
        assert tracemalloc.get_traced_memory()[1] < 100 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 20
    assert [path.name for path in tmp_path.rglob("*")] == ["c", name]
    assert str(error.value).startswith(str(tmp_path / "c")) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_world_size_1_rank_0.pt"])
@pytest.mark.parametrize("fault", PICKLES)
def test_a_pickle_can_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    pickle, says = PICKLES[fault]
    said = attempt(tmp_path, zipped(pickle), name)
    assert any(word in said for word in says.split("|")) or "is no tensor but" in said, said


@pytest.mark.parametrize("fault", ZIPS)
def test_a_zip_file_that_lies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    data, says = ZIPS[fault]
    assert says in attempt(tmp_path, data, "pytorch_model.bin")


def test_the_good_ones_are_good(tmp_path: Path) -> None:
    """The faults above are faults of these."""
    (tmp_path / "pytorch_model.bin").write_bytes(GOOD)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors == {"w": ("F32", (2, 3))}
    out = bytearray(24)
    checkpoint.read("w", 0, memoryview(out))
    assert bytes(out) == np.arange(6, dtype=np.float32).tobytes()


def test_truncation_anywhere(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        (tmp_path / "pytorch_model.bin").write_bytes(GOOD[:size])
        with pytest.raises(IncompleteError, match="truncated"):
            open_checkpoint(tmp_path)


def test_too_much_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for bomb in (memoized(3000, b"}"), b"}" * 9000, b"N" * 9000, number(5) * 9000):
        monkeypatch.setattr(unpickle, "_MAX_STEPS", 2000)
        with pytest.raises(CheckpointError, match="more entries"):
            unpickle.loads(b"\x80\x02" + bomb + b".", ())
    monkeypatch.setattr(unpickle, "MAX_PICKLE", 100)
    with pytest.raises(CheckpointError, match="more than that of any model"):
        unpickle.loads(b"\x80\x02" + b"N" * 100, ())


def test_shared_values_are_not_copied() -> None:
    """What JSON calls a billion laughs: forty levels of tables that each have the one below ten times."""
    assert isinstance(unpickle.loads(_laughs(), ()), tuple)


def _laughs() -> bytes:
    parts = [b"\x80\x02)q\0"]
    for n in range(40):
        parts.append(b"(" + (b"h" + bytes([n])) * 10 + b"tq" + bytes([n + 1]) + b"\x86")
    return b"".join(parts) + b"."


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    with open(tmp_path / "model_world_size_1_rank_0.pt", "wb") as file:
        file.write(GOOD)
        file.truncate(1 << 40)
    with pytest.raises(IncompleteError, match="truncated"):
        open_checkpoint(tmp_path)
