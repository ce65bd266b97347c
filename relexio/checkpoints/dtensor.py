"""What a rank's file says of a tensor: a plain one, or the rows of it that the rank has (torch's DTensor)."""

from dataclasses import dataclass
from math import prod
from typing import Any

from relexio.checkpoints.converters import HF_MODEL, MergeableError
from relexio.checkpoints.torch_file import DTYPES, TENSOR_NAMES, Array, Contents, counts
from relexio.checkpoints.unpickle import Global, Record
from relexio.errors import CheckpointError

_TENSOR = "torch.distributed.tensor"
_HOMES = (_TENSOR, "torch.distributed._tensor")  # since torch 2.5, and before
_DTENSORS = {f"{home}{name}" for home in _HOMES for name in (".DTensor", "._api.DTensor", ".api.DTensor")}
_SPEC = {
    f"{home}.{module}.{name}"
    for home in _HOMES
    for module in ("_dtensor_spec", "placement_types")
    for name in (
        "DTensorSpec",
        "TensorMeta",
        "ShardOrderEntry",
        "Shard",
        "Replicate",
        "Partial",
        "_Partial",
        "_StridedShard",
    )
}
_MESH = {
    "torch.distributed.device_mesh.DeviceMesh", "torch.distributed._mesh_layout._MeshLayout",
    "torch.distributed._mesh_layout._FlatLayout",
}  # fmt: skip
#: The names that occur in the file of one rank.
SHARD_NAMES = frozenset({*TENSOR_NAMES, *_DTENSORS, *_SPEC, *_MESH, "torch._utils._rebuild_wrapper_subclass"})


@dataclass(frozen=True)
class Local:
    """What one file holds of a tensor of this ``shape``: all, or the rows of shard ``index`` of ``shards``.

    ``rank`` is that of the process that wrote them, if the file says so.
    """

    array: Array
    shape: tuple[int, ...]
    shards: int = 1
    index: int = 0
    rank: int | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """The rows that a shard has, as ``torch.chunk`` divides them: the last shards have fewer, or none."""
        if self.shards == 1:
            return 0, self.shape[0] if self.shape else 1
        each = -(-self.shape[0] // self.shards)
        return min(self.shape[0], self.index * each), min(self.shape[0], (self.index + 1) * each)


def local_of(value: Any, contents: Contents) -> Local:
    """What a value of a state dict is. Raises CheckpointError (which names no file) for any that cannot be read."""
    value = _inner(value)
    array = contents.array(value)
    if array is not None:
        return Local(array, array.shape)
    if not isinstance(value, Record) or value.kind != "torch._tensor._rebuild_from_type_v2" or len(value.args) != 4:
        what = value.kind if isinstance(value, Record) else type(value).__name__
        raise CheckpointError(f"is no tensor but {what}; save the model's state_dict() alone")
    _, kind, args, state = value.args
    state = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    if not isinstance(kind, Global) or kind.name not in _DTENSORS or not isinstance(state, dict):
        raise CheckpointError("is a tensor of a class that cannot be read; save it again as a plain tensor")
    spec, array = _fields(state.get("_spec"), "_spec"), contents.array(state.get("_local_tensor"))
    if array is None or not isinstance(args, tuple) or len(args) != 8:
        raise CheckpointError(_ODD)
    meta = spec.get("tensor_meta")
    if not isinstance(meta, Record) or len(meta.args) != 3 or counts(meta.args[0], "shape") != counts(args[2], "shape"):
        raise CheckpointError(_ODD)
    if not isinstance(args[1], Global) or DTYPES.get(args[1].name.removeprefix("torch.")) != array.dtype:
        raise CheckpointError("its part in this file has another dtype than the whole")
    return _placed(array, counts(args[2], "shape"), spec)


_ODD = "is a distributed tensor that torch did not write so"


def _inner(value: Any) -> Any:
    """The tensor in a parameter."""
    while isinstance(value, Record) and value.kind.startswith("torch._utils._rebuild_parameter") and value.args:
        value = value.args[0]
    return value


def _fields(value: Any, what: str) -> dict[str, Any]:
    state = value.state if isinstance(value, Record) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{_ODD}: it has no {what}")
    return state


def _placed(array: Array, shape: tuple[int, ...], spec: dict[str, Any]) -> Local:
    """The rows that the file's rank has, by the placements on the mesh of devices."""
    mesh = _fields(spec.get("mesh"), "mesh")
    placements, sizes = spec.get("placements"), _mesh_sizes(mesh)
    coordinate = counts(mesh.get("_coordinate_on_dim"), "place in the mesh")
    if not isinstance(placements, tuple) or not len(placements) == len(sizes) == len(coordinate):
        raise CheckpointError(f"{_ODD}: its placements do not fit its mesh")
    if any(at >= size for at, size in zip(coordinate, sizes, strict=True)):
        raise CheckpointError(f"{_ODD}: its rank is outside its mesh")
    shards = [(size, at) for p, size, at in zip(placements, sizes, coordinate, strict=True) if _is_shard(p)]
    if len(shards) > 1:
        raise CheckpointError(f"is sharded over more than one dimension of the mesh; {HF_MODEL}")
    if shards and not shape:
        raise CheckpointError(f"{_ODD}: a scalar cannot be sharded")
    count, index = shards[0] if shards else (1, 0)
    rank = mesh.get("_rank")
    local = Local(array, shape, count, index, rank if type(rank) is int else None)
    first, last = local.rows
    expected = (last - first, *shape[1:]) if shards else shape
    if array.shape != expected and not 0 == prod(array.shape) == prod(expected):
        raise MergeableError(
            f"its part in this file has shape {list(array.shape)} where shard {index} of {count} of {list(shape)} has "
            f"{last - first} rows"
        )
    return local


def _is_shard(placement: Any) -> bool:
    """Whether a placement divides dimension 0. Raises CheckpointError unless it does, or replicates."""
    kind = placement.kind.rpartition(".")[2] if isinstance(placement, Record) and placement.kind in _SPEC else "?"
    if kind == "Replicate":
        return False
    if kind != "Shard":
        raise CheckpointError(f"its placement is {kind}, which cannot be read; {HF_MODEL}")
    if (dim := _fields(placement, "dim").get("dim")) != 0:
        raise MergeableError(f"is sharded along dimension {dim}, not 0")
    return True


def _mesh_sizes(mesh: dict[str, Any]) -> tuple[int, ...]:
    """The sizes of a mesh: torch 2.13 has layouts for its axes, 2.9 one layout for all, before there was a tensor of ranks."""
    if "_layout" in mesh:
        layout = _fields(mesh["_layout"], "layout")
        if "axes" in layout and isinstance(layout["axes"], tuple | list):
            return tuple(prod(counts(_fields(axis, "axis").get("shape"), "mesh")) for axis in layout["axes"])
        shape = layout.get("shape")
        return (shape,) if type(shape) is int else counts(shape, "mesh")
    ranks = mesh.get("mesh")
    if isinstance(ranks, Record) and ranks.kind == "torch._utils._rebuild_tensor_v2" and len(ranks.args) > 3:
        return counts(ranks.args[2], "mesh")
    raise CheckpointError(f"{_ODD}: its mesh has no sizes")
