"""The bytes of the store and of a written checkpoint, fixed: other readers depend on them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr

from relexio.checkpoints.header import header_for_transformers
from tests.support.make import BF16, Run, save_file
from tests.support.steps import fit_run, predict_run, store_run


def tiny(root: Path) -> Run:
    """One tensor of ten elements, of which step 1 changes the second and step 4 the second, third and last."""
    base = np.arange(1, 11, dtype=np.float32).astype(BF16)
    first, second = base.copy(), base.copy()
    first[1], second[1], second[2], second[9] = 2.5, 3.0, 3.5, -1.0
    return Run(root, {"w": base}, {1: {"w": first}, 4: {"w": second}})


def test_store(tmp_path: Path) -> None:
    one = tiny(tmp_path / "two")
    run = Run(tmp_path, one.base, {**one.steps, 6: one.steps[4]})
    store_run(run, tmp_path / "run.zarr")
    root: Any = zarr.open_group(tmp_path / "run.zarr", mode="r")

    def hash_of(path: str | Path) -> str:
        return xxhash.xxh3_128_hexdigest((tmp_path / "run.zarr" / path / "zarr.json").read_bytes())

    def arrays(path: str, *names: str) -> list[str]:
        return [f"{path}/bf16/{name}" for name in names]

    assert root.attrs["relexio"] == {
        "format": 2,
        "block": 1024,
        "base_content": "3414b3333ee8860eb87f523f059a4409373f13a5ff3110f1855b62f53e300a26",
        "metadata": {
            path: hash_of(path) for path in ("groups", "base", "base/bf16", *arrays("base", "bits", "digest"))
        },
        "groups": [
            {
                "name": "0000",
                "steps": [1, 4, 6],
                "content": root.attrs["relexio"]["groups"][0]["content"],
                "metadata": root.attrs["relexio"]["groups"][0]["metadata"],
            }
        ],
        "seal": root.attrs["relexio"]["seal"],
    }
    marker = (tmp_path / "run.zarr/zarr.json").read_bytes()
    seal = root.attrs["relexio"]["seal"].encode()
    assert xxhash.xxh3_128_hexdigest(marker.replace(seal, b"0" * 32)).encode() == seal
    group = root.attrs["relexio"]["groups"][0]["metadata"]
    assert group == {
        str(path.parent.relative_to(tmp_path / "run.zarr")): hash_of(path.parent)
        for path in (tmp_path / "run.zarr/groups/0000").rglob("zarr.json")
    }
    block_digest = xxhash.xxh3_128(run.base["w"].tobytes()).digest()
    assert root.attrs["relexio"]["base_content"] == hashlib.sha256(block_digest).hexdigest()
    assert root["base"].attrs["tensors"] == [{"name": "w", "dtype": "BF16", "shape": [10], "first_block": 0}]
    base = root["base/bf16/bits"]
    assert (base.dtype, base.shape, base.chunks) == ("uint16", (1024,), (1024,))
    assert base[:11].tolist() == [*run.base["w"].view(np.uint16).tolist(), 0]
    count, step, xor = (root[f"groups/0000/bf16/{name}"] for name in ("count", "step", "xor"))
    assert (count.dtype, count.shape, count.chunks) == ("uint8", (1024,), (1024,))
    assert count[:11].tolist() == [0, 2, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert (step.dtype, step.shape, step.chunks) == ("uint8", (4096,), (4096,))
    assert (xor.dtype, xor.shape, xor.chunks) == ("uint16", (4096,), (4096,))
    assert step[:5].tolist() == [0, 1, 1, 1, 0]
    assert xor[:5].tolist() == [0x0020, 0x0040, 0x0020, 0xFEA0, 0]
    assert root["groups/0000/changed"][:].tolist() == [[1, 3, 3]]
    digest = root["groups/0000/bf16/digest"][0, 1].tobytes()
    assert digest == xxhash.xxh3_128(run.steps[4]["w"].tobytes()).digest()
    assert [c["name"] for c in json.loads((tmp_path / "run.zarr/groups/0000/bf16/xor/zarr.json").read_text())["codecs"]] == [
        "bytes", "blosc", "crc32c",
    ]  # fmt: skip


def test_written_checkpoint(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    out = predict_run(fit_run(store_run(run, tmp_path / "run.zarr")), 10, tmp_path / "out")
    written, base = ((p / "model.safetensors").read_bytes() for p in (out, run.base_path))
    assert written[:-20] == base[:-20], "header and order are the base's"
    found = np.frombuffer(written[-20:], np.uint16).view(BF16)
    assert found[[0, *range(3, 9)]].tolist() == run.base["w"][[0, *range(3, 9)]].tolist(), (
        "what never changed is the base's"
    )
    assert found[[1, 2, 9]].astype(float).tolist() == [5.0, 4.5, -22.875]  # the float64 oracle, rounded


def test_a_header_without_format_gets_one(tmp_path: Path) -> None:
    save_file(tmp_path / "x.safetensors", {"w": np.zeros(3, np.float32)}, metadata={"by": "me"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = header_for_transformers(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header == (
        b'{"__metadata__":{"by":"me","format":"pt"},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    ) + b" " * (-len(header.rstrip()) % 8)
