"""Makes chains.tar.xz with the writers of slime, miles and SkyRL: python -m tests.deltas.make

Their source is on the PYTHONPATH, as it was at slime 624b824, miles 31f1ca9 and SkyRL a956457, with torch, zstandard,
xxhash and blake3. What they import of ray and Megatron is not: it stands here in name, so that two gloo processes are two
pipeline stages, and there are no engines to be told. The classes that encode and write are their own, untouched.
"""

import argparse
import importlib
import importlib.util
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.deltas import ARCHIVE, CHAINS, VERSIONS, model
from tests.support.make import save_checkpoint

SLIME = "slime.backends.megatron_utils.update_weight"
MILES = "miles.backends.megatron_utils.update_weight"
SKYRL = "skyrl.backends.skyrl_train.weight_sync"


def stand_in(name: str, **members: Any) -> None:
    """A module that only has these."""
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(members)


def without_init(name: str) -> None:
    """A package of the library whose own beginning, which imports everything, is not run."""
    parts = name.split(".")
    top = importlib.util.find_spec(parts[0])
    assert top is not None and top.submodule_search_locations
    for depth in range(2, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = [str(Path(top.submodule_search_locations[0], *parts[1:depth]))]
        sys.modules[module.__name__] = module


class Rank:
    """What Megatron says of a process: the first of its kind."""

    rank = 0


class Parallel:
    """A pipeline stage without data or tensor parallelism."""

    intra_dp_cp, tp = Rank, Rank


def torch_model(version: int) -> dict[str, torch.Tensor]:
    """The tensors of a version in torch."""
    tensors = {}
    for name, array in model(version).items():
        raw = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
        tensors[name] = raw.view(torch.float32 if array.dtype == np.float32 else torch.bfloat16).reshape(array.shape)
    return tensors


class Tensors:
    """What the writers inherit, in place of the gathering from Megatron: the tensors of this stage, at a version."""

    version = 0

    def __init__(self, args: argparse.Namespace, *_: Any, **__: Any) -> None:
        self.args, self.weight_version = args, 0

    def _init_lora(self, **_: Any) -> None:
        """There is none."""

    def own(self) -> list[tuple[str, torch.Tensor]]:
        """Every second tensor; the last stage has the embedding too, as miles' stages may."""
        tensors = list(torch_model(type(self).version).items())
        again = tensors[:1] if type(self).both and dist.get_rank() else []
        return tensors[dist.get_rank() :: 2] + again

    both = False

    def _iter_non_expert_chunks(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield self.own()

    def _iter_expert_chunks(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield from ()

    def _gather_and_update_non_expert_weights(self, take: Any, pbar: Any) -> None:
        take(self.own(), pbar)

    def _gather_and_update_expert_weights(self, take: Any, pbar: Any) -> None:
        """There are none."""


def writer(library: str) -> Any:
    """The library's own class."""
    stand_in("ray", get=lambda value: value)
    stand_in("ray.actor", ActorHandle=object)
    stand_in("megatron")
    one = {"get_data_parallel_rank": lambda **_: 0, "get_tensor_model_parallel_rank": lambda: 0}
    stand_in("megatron.core", mpu=argparse.Namespace(**one))
    stand_in(f"{library}.utils.distributed_utils", get_gloo_group=lambda: dist.group.WORLD)
    if library == "slime":
        without_init(SLIME)
        stand_in(f"{SLIME}.update_weight_from_distributed", UpdateWeightFromDistributed=Tensors)
        return importlib.import_module(f"{SLIME}.update_weight_from_disk_delta").UpdateWeightFromDiskDelta
    without_init(f"{MILES}.update_weight_from_distributed")
    stand_in(f"{MILES}.common", _check_weight_sync_results=lambda *_, **__: None)
    stand_in(f"{MILES}.update_weight_from_distributed.mixin", DistBucketedWeightUpdateMixin=Tensors)
    stand_in("miles.backends.training_utils")
    stand_in("miles.backends.training_utils.parallel", get_parallel_state=lambda: Parallel)
    return importlib.import_module(f"{MILES}.update_weight_from_distributed.delta").UpdateWeightFromDiskDelta


def sync(rank: int, name: str, checksum: str, base: str, out: str, port: int) -> None:
    """One of two stages: the first sync takes the base, every later one writes a version."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    library, encoding = name.split("-")
    args = argparse.Namespace(
        update_weight_disk_dir=out,
        update_weight_delta_encoding=encoding,
        update_weight_delta_checksum=checksum,
        custom_update_weight_post_write_path=None,
        hf_checkpoint=base,
        check_weight_update_equal=False,
    )
    made = writer(library)(args, [], dict, model_name="", quantization_config=None)
    Tensors.both = library == "miles"
    made._is_pp_src_rank, made.rollout_engines, made._group_name = True, [], "deltas"
    made._reload_engines = made._record_metrics = lambda: None
    for Tensors.version in (0, *VERSIONS):
        made.update_weights()
    dist.destroy_process_group()


def skyrl(base: str, out: str) -> None:
    """SkyRL's publisher: rank 0 writes all."""
    without_init(SKYRL)
    checkpoint = importlib.import_module(f"{SKYRL}.delta_checkpoint")
    chunk = importlib.import_module(f"{SKYRL}.base").WeightChunk
    with tempfile.TemporaryDirectory() as staging:
        small = {"max_file_size_in_gb": 2000 / 1024**3, "publish_num_workers": 1}  # two files in each version
        made = checkpoint.DeltaCheckpointPublisher(base, out, f"{staging}/staging", **small)
        for version in VERSIONS:
            tensors = torch_model(version)
            types, shapes = [str(t.dtype) for t in tensors.values()], [list(t.shape) for t in tensors.values()]
            made.publish(made.create_delta_files([chunk(list(tensors), types, shapes, list(tensors.values()))]))


def main() -> None:
    """Write all chains, and pack them."""
    checksums = {
        "slime-xor": "xxh3-128",
        "slime-overwrite": "adler32",
        "miles-xor": "xxh3-128",
        "miles-overwrite": "blake3",
    }
    with tempfile.TemporaryDirectory() as folder:
        base = str(save_checkpoint(Path(folder) / "base", model(0)))
        for port, (name, checksum) in enumerate(checksums.items(), 29511):
            mp.spawn(sync, (name, checksum, base, f"{folder}/{name}", port), nprocs=2)
        skyrl(base, f"{folder}/skyrl")
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for name in CHAINS:
                archive.add(f"{folder}/{name}", name, filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main()
