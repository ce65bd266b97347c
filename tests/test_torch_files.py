"""Torch files are read as what torch wrote: fixtures of the real library, and those that must be refused, by name.

tests/torch_files/make.py made the fixtures; no torch is needed to read them.
"""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.checkpoints.layout import FORMATS, Format, find_steps, open_checkpoint
from relexio.checkpoints.pieces import Piece, tiled
from relexio.checkpoints.protocol import Checkpoint
from relexio.errors import CheckpointError, IncompleteError
from relexio.store.opening import open_store
from tests.support.command import Relexio
from tests.support.make import NAMES, Tensors, load_checkpoint, save_checkpoint
from tests.support.torch_model import many_types, model

FILES = Path(__file__).parent / "torch_files"
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in FILES.glob("torch-*.tar.xz"))
SHARDS = ["fsdp1-1", "fsdp1-2", "fsdp2-1", "fsdp2-2", "fsdp2-4", "hsdp1", "hsdp2"]


@pytest.fixture(params=VERSIONS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """All that one version of torch wrote."""
    with tarfile.open(FILES / f"{request.param}.tar.xz") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    return tmp_path / "made"


def read(checkpoint: Checkpoint, name: str, first: int = 0, count: int | None = None) -> bytes:
    dtype, shape = checkpoint.tensors[name]
    size = next(
        np.dtype(n).itemsize if n[:2] in ("in", "ui", "fl", "bo") and "8_" not in n else 0
        for n, d in NAMES.items()
        if d == dtype
    )
    out = bytearray(int(np.prod(shape)) * (size or (2 if dtype == "BF16" else 1)) if count is None else count)
    checkpoint.read(name, first, memoryview(out))
    return bytes(out)


def same(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """The tensors, whole and in pieces that cross from one file into the next."""
    assert checkpoint.tensors == {name: (NAMES[a.dtype.name], a.shape) for name, a in tensors.items()}
    for name, array in tensors.items():
        data = array.tobytes()
        assert read(checkpoint, name) == data, name
        for first in range(0, len(data), 7):
            count = min(11, len(data) - first)
            assert read(checkpoint, name, first, count) == data[first : first + count], (name, first)
        with checkpoint.held(name, 0, len(data)) as piecewise:
            got = bytearray(len(data))
            for first in reversed(range(0, len(data), 5)):
                piecewise(first, memoryview(got)[first : first + 5])
            assert bytes(got) == data


def ordered(tensors: Tensors, checkpoint: Checkpoint) -> Tensors:
    return {name: tensors[name] for name in checkpoint.tensors}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_of_all_ranks_are_one_model(made: Path, name: str) -> None:
    (step,) = (made / name).glob("actor")
    checkpoint = open_checkpoint(step, 3)
    same(checkpoint, ordered(model(), checkpoint))
    assert set(checkpoint.side) == {"config.json"}
    assert set(checkpoint.not_stored()) == {"fsdp_config.json"}
    assert pickle.loads(pickle.dumps(checkpoint)).tensors == checkpoint.tensors  # noqa: S301
    assert len(checkpoint.files) == (2 if name[:4] == "hsdp" else int(name[-1]))


@pytest.mark.parametrize(("name", "tensors"), [("bin", many_types()), ("bins", model())])
def test_torch_files_in_hugging_face_layout(made: Path, name: str, tensors: Tensors) -> None:
    checkpoint = open_checkpoint(made / name)
    same(checkpoint, ordered(tensors, checkpoint))
    assert not checkpoint.not_stored()


def test_tensors_that_share_a_storage(made: Path) -> None:
    checkpoint = open_checkpoint(made / "shared")
    same(checkpoint, {"w": np.ones((2, 3), np.float32), "v": np.ones(3, np.float32)})


def test_a_tensor_that_every_rank_has_whole(made: Path) -> None:
    same(open_checkpoint(made / "odd-replicated/actor"), {"w": np.arange(16, dtype=np.float32).reshape(4, 4)})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("legacy", "before torch 1.6; save it again: python -c"),
        ("sparse", "torch._utils._rebuild_sparse_tensor"),
        ("columns", "tensor w: its elements do not lie in order"),
        ("trainer", "tensor model: is no plain tensor"),
        ("module", "torch.nn.modules.linear.Linear"),
        ("odd-columns/actor", "tensor w: is sharded along dimension 1, not 0; merge"),
        ("odd-partial/actor", "tensor w: its placement is _?Partial, which cannot be read; verl"),
        ("odd-twice/actor", "tensor w: is sharded over more than one dimension of the mesh; verl|_StridedShard"),
        ("odd-strided/actor", "tensor w: its placement is _StridedShard, which cannot be read; verl"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(made: Path, name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{made / name}/.*({says})") as error:
        open_checkpoint(made / name)
    assert "\n" not in str(error.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


RANK = "model_world_size_4_rank_{}.pt"


@pytest.mark.parametrize(
    ("spoil", "says", "kind"),
    [
        (lambda p: (p / RANK.format(2)).unlink(), f"{RANK.format(2)}: missing; copy", IncompleteError),
        (lambda p: (p / RANK.format(0)).unlink(), f"{RANK.format(0)}: missing; copy", IncompleteError),
        (lambda p: (p / RANK.format(3)).unlink(), f"{RANK.format(3)}: missing; copy", IncompleteError),
        (lambda p: cut(p / RANK.format(1)), f"{RANK.format(1)}: trunc", IncompleteError),
        (lambda p: (p / "model_world_size_2_rank_0.pt").touch(), "runs on 2 and 4 ranks", CheckpointError),
        (lambda p: shutil.copy(p / RANK.format(1), p / RANK.format(2)), "rank 1|does not fit", CheckpointError),
    ],
)  # fmt: skip
def test_ranks_that_do_not_make_a_model(made: Path, spoil: Callable[[Path], object], says: str, kind: type) -> None:
    path = made / "fsdp2-4" / "actor"
    spoil(path)
    with pytest.raises(kind, match=f"^{path}.*({says})"):
        open_checkpoint(path)


def test_shards_of_another_model_are_refused(made: Path) -> None:
    path = made / "fsdp2-2/actor"
    shutil.copy(made / "fsdp1-1/actor/model_world_size_1_rank_0.pt", path / "model_world_size_2_rank_1.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the other ranks|written by rank 0"):
        open_checkpoint(path)


def test_the_other_ranks_of_a_mesh_suffice(made: Path) -> None:
    path = made / "hsdp2/actor"
    (path / RANK.format(0)).unlink()
    (path / RANK.format(3)).unlink()
    checkpoint = open_checkpoint(path)
    same(checkpoint, ordered(model(), checkpoint))
    (path / RANK.format(2)).unlink()
    with pytest.raises(IncompleteError, match=f"{RANK.format(0)}: missing"):
        open_checkpoint(path)


def test_files_that_are_removed_are_read_to_their_end(made: Path) -> None:
    checkpoint = open_checkpoint(made / "fsdp2-4/actor")
    with checkpoint.kept_open():
        shutil.rmtree(made / "fsdp2-4")
        same(checkpoint, ordered(model(), checkpoint))
        checkpoint.assert_unchanged()
    with pytest.raises(FileNotFoundError):
        read(checkpoint, "model.norm.weight")


def test_a_file_that_shrinks_or_leads_out_is_told(made: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made / "bin")
    file = made / "bin/pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="ended while it was read"):
        read(checkpoint, "t.float32")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.assert_unchanged()
    file.rename(tmp_path / "elsewhere.bin")
    file.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(made / "bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("model.norm.weight"), "model.norm.weight: the index says None"),
        (lambda m: m.update(ghost="pytorch_model-00001-of-00002.bin"), "ghost"),
        (lambda m: m.update(ghost="../x.bin"), "outside its directory"),
        (lambda m: m.update(ghost="pytorch_model-00003-of-00003.bin"), "missing"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_an_index_that_is_not_right(made: Path, change: Callable[[dict[str, str]], object], says: str) -> None:
    index = made / "bins/pytorch_model.bin.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(made / "bins")
    index.unlink()
    with pytest.raises(IncompleteError, match="2 files pytorch_model"):
        open_checkpoint(made / "bins")


def convert(relexio: Relexio, steps: Path, base: Path, out: Path) -> dict[int, str]:
    done = relexio("convert", steps, "--base", base, "-o", out)
    assert done.code == 0, done.err
    return open_store(out).contents


def test_a_run_of_shards_is_stored_as_the_same_safetensors_would_be(
    made: Path, tmp_path: Path, relexio: Relexio
) -> None:
    base = save_checkpoint(tmp_path / "base", {name: array - array.dtype.type(1) for name, array in model().items()})
    kinds = {1: "fsdp1-2", 2: "fsdp2-4", 3: "hsdp1", 4: "fsdp1-1"}
    for step, name in kinds.items():
        shutil.copytree(made / name, tmp_path / f"run/global_step_{step}")
        save_checkpoint(tmp_path / f"plain/global_step_{step}", model())
    others = {5: "bins", 6: "dcp/checkpoint-3", **({7: "chunks/step-3"} if (made / "chunks").is_dir() else {})}
    for step, name in others.items():
        shutil.copytree(made / name, tmp_path / f"run/global_step_{step}")
        save_checkpoint(tmp_path / f"plain/global_step_{step}", model())
    assert find_steps(tmp_path / "run")[0][1].name == "actor"
    stored = convert(relexio, tmp_path / "run", base, tmp_path / "run.zarr")
    assert stored == convert(relexio, tmp_path / "plain", base, tmp_path / "plain.zarr")
    assert list(stored) == [*kinds, *others]
    done = relexio("restore", tmp_path / "run.zarr", "--step", 2, "-o", tmp_path / "back")
    assert done.code == 0, done.err
    back = load_checkpoint(tmp_path / "back")
    assert list(back) == list(model()) and all(
        back[name].tobytes() == array.tobytes() for name, array in model().items()
    )
    assert (tmp_path / "back/config.json").read_text() == "{}\n"
    for name, code in (("run", 0), ("plain", 1)):  # one of other files with the same tensors gives these back no better
        done = relexio("verify", tmp_path / f"{name}.zarr", tmp_path / "run")
        assert done.code == code and "tensor " not in done.err, "only side files differ"
        steps = f"{len(stored)} steps, 1 to 7" if 7 in stored else "steps 1, 2, 3, 4, 5, 6"
        assert f"weight files of {steps}: restore writes them as safetensors\n" in done.out, done.out


def test_nothing_of_torch_is_imported(made: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from relexio.checkpoints.layout import find_steps, open_checkpoint\n"
        "for path in find_steps(Path('dcp'))[0].values(): open_checkpoint(path)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=made, check=True)


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """DCP in safetensors, which torch 2.6 cannot write."""
    with tarfile.open(FILES / "torch-2.13.tar.xz") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    return tmp_path / "made" / "chunks" / "step-3" / "sharded"


CHUNK = "shard-0000{}-model-00001-of-00001.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file; the offsets of tensors are under "offsets"."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    info = json.loads(header["__metadata__"].get("DCP_SHARDING_INFO", "{}"))
    change({"header": header, "offsets": info, "metadata": header["__metadata__"]})
    if "DCP_SHARDING_INFO" in header["__metadata__"]:
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_chunks_in_safetensors_are_one_model(chunks: Path) -> None:
    checkpoint = open_checkpoint(chunks)
    same(checkpoint, ordered(model(), checkpoint))
    assert find_steps(chunks.parents[1])[0] == {3: chunks}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda h: h["offsets"]["lm_head.weight"].update(saved_offsets=[4, 0]),
            "tensor lm_head.weight: its .*9 rows of 8",
        ),
        (
            lambda h: h["offsets"]["lm_head.weight"].update(saved_offsets=[6, 0]),
            "tensor lm_head.weight: its .*9 rows of 10",
        ),
        (lambda h: h["offsets"]["lm_head.weight"].update(saved_offsets=[5, 1]), "tensor lm_head.weight: .*dimension"),
        (
            lambda h: h["offsets"]["lm_head.weight"].update(saved_offsets=[5]),
            "tensor lm_head.weight: its saved_offsets",
        ),
        (lambda h: h["offsets"]["lm_head.weight"].update(saved_offsets="05"), "lm_head.weight: its saved_offsets"),
        (lambda h: h["offsets"].pop("lm_head.weight"), "tensor lm_head.weight: its"),
        (lambda h: h["metadata"].pop("DCP_SHARDING_INFO"), "no DCP_SHARDING_INFO"),
        (lambda h: h["metadata"].update(DCP_VERSION="2.0"), "DCP_VERSION 1.0"),
        (lambda h: h["header"].pop("lm_head.weight"), "offset|overlap|gap|begin"),
    ],
)
def test_chunks_that_do_not_tile_a_tensor(chunks: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    rewrite(chunks / CHUNK.format(2), change)
    with pytest.raises(CheckpointError, match=f"^{chunks}.*({says})"):
        open_checkpoint(chunks)


def test_a_file_of_chunks_that_is_missing(chunks: Path) -> None:
    (chunks / CHUNK.format(1)).unlink()
    with pytest.raises(IncompleteError, match=r"shard-00001-\* are missing"):
        open_checkpoint(chunks)


@pytest.mark.parametrize("form", [FORMATS[0], *FORMATS[3:-1]])
def test_files_that_are_gone_by_now(tmp_path: Path, form: Format) -> None:
    with pytest.raises(IncompleteError, match="are gone"):
        form.open(tmp_path, 1, None)


def test_what_accelerate_saves_under_fsdp_two(made: Path) -> None:
    (made / "dcp/checkpoint-3/config.json").write_text("{}")
    (made / "dcp/checkpoint-3/optimizer_0").mkdir()
    (made / "dcp/checkpoint-3/optimizer_0/__0_0.distcp").write_bytes(b"state")
    assert find_steps(made / "dcp")[0] == {3: made / "dcp/checkpoint-3"}
    for path in (made / "dcp/checkpoint-3", made / "dcp/checkpoint-3/pytorch_model_fsdp_0"):
        checkpoint = open_checkpoint(path)
        same(checkpoint, ordered(model(), checkpoint))
    checkpoint = open_checkpoint(made / "dcp/checkpoint-3")
    assert (set(checkpoint.side), set(checkpoint.not_stored())) == ({"config.json"}, {"optimizer_0/"})


def replace(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Other bytes in .metadata, as many."""

    def do(path: Path) -> None:
        data = (path / ".metadata").read_bytes()
        assert old in data and len(old) == len(new)
        (path / ".metadata").write_bytes(data.replace(old, new))

    return do


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: (p / ".metadata").unlink(), ".metadata: missing"),
        (lambda p: (p / ".metadata").write_bytes(b"x"), ".metadata: its pickle has opcode 0x78"),
        (
            lambda p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:-9]),
            ".metadata: its pickle is damaged",
        ),
        (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp: missing"),
        (lambda p: cut(p / "__1_0.distcp"), "__1_0.distcp: truncated"),
        (replace(b"_StorageInfo", b"_StorageInfX"), "filesystem._StorageInfX"),
        (replace(b"PosixPath", b"PosixPatX"), "PosixPatX"),
        (replace(b"__1_0.distcp", b"../_0.distcp"), "outside its directory: '../_0.distcp'"),
        (replace(b"__1_0.distcp", b"__0_0.distcp"), "two chunks overlap in __0_0.distcp"),
        (replace(b"\x8c\x05model\x94", b"\x8c\x05mXdel\x94"), "not below 'model'"),
        (replace(b"float32", b"float64"), "tensor .*: its chunk in __._0.distcp is something else"),
        (replace(b"\x8c\x06offset", b"\x8c\x06offsex"), "list of numbers"),
    ],
)
def test_a_dcp_that_is_not_right(made: Path, spoil: Callable[[Path], object], says: str) -> None:
    path = made / "dcp/checkpoint-3/pytorch_model_fsdp_0"
    spoil(path)
    with pytest.raises(CheckpointError, match=f"^{path}.*({says})"):
        open_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("firsts", "says"),
    [((0, 4), "overlap at byte 4"), ((0, 12), "leave a gap at byte 12"), ((8, 16), "gap"), ((0,), "has|have")],
)
def test_pieces_that_do_not_tile(firsts: tuple[int, ...], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        tiled([Piece(first, 8, 0, 100, 8, 8) for first in firsts], "F32", (4,))
    assert len(tiled([Piece(first, 8, 0, 100, 8, 8) for first in (8, 0)], "F32", (4,))) == 2
