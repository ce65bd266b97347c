"""The files of a checkpoint: their names, and which of them belong to the model, by the rule of docs/store.md."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import ENAMETOOLONG
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from relexio.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
#: Names in the path of a stored file, and bytes of it.
DEEPEST, LONGEST = 32, 1024

#: What a trainer needs to go on: names of files, and of directories with all that is in them.
_STATE = (
    "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin", "scaler*.pt", "rng_state*.pth",
    "random_states_*.pkl", "custom_checkpoint_*.pkl", "training_args.bin", "sampler*.bin", "dl_state_dict*.bin",
    "model_world_size_*.pt", "optim_world_size_*.pt", "extra_state_world_size_*.pt", "data.pt", "*.distcp", ".metadata",
    "*mp_rank_*_model_states.pt", "*_optim_states.pt", "latest", "latest_checkpointed_iteration.txt",
)  # fmt: skip
_STATE_FOLDERS = ("global_step*", "pytorch_model_fsdp_*", "optimizer", "optimizer_*")
#: Other checkpoints, logs, and what tools keep for themselves.
_OTHER = ("events.out.tfevents.*",)
_OTHER_FOLDERS = (
    "checkpoint-*", "step_*", "step-*", "runs", "logs", "wandb", "mlruns", "tensorboard", ".git", ".cache", "__pycache__",
    ".ipynb_checkpoints",
)  # fmt: skip
#: Files of tensors, or of pickled objects, that the loader of the weights does not take.
_TENSORS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz", ".gguf", ".onnx", ".onnx_data",
}  # fmt: skip
_MOST, _MOST_TENSORS = 1 << 30, 64 << 20  # bytes


@dataclass(frozen=True)
class File:
    """A file that weights are read from, as it was when it was opened first."""

    path: Path
    size: int
    mtime_ns: int


def is_file(path: Path) -> bool:
    """Whether the path is a file. A link to a name that no file can have counts as a dead link."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != ENAMETOOLONG:  # a permission that is missing is told by its name
            raise
        return False


def inside(directory: Path, file: Path) -> Path:
    """The file. Raises CheckpointError for a link out of its directory: its target would be stored, and published.

    The Hub's cache is made of links to ``blobs`` beside ``snapshots``; these are followed.
    """
    real, here = file.resolve(), directory.resolve()
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else here
    if not real.is_relative_to(here) and not real.is_relative_to(blobs):
        raise CheckpointError(f"{file}: a link to {real}, outside its directory; put a copy of the file in its place")
    return file


def side_files(directory: Path, taken: Collection[str]) -> dict[str, Path]:
    """The files of the model except those ``taken``, which hold its weights, by their path inside the directory.

    Raises CheckpointError for a link to a file outside.
    """
    files = [(file, name) for name, file in _entries(directory) if name not in taken and _belongs(name, file)]
    return {name: inside(directory, file) for file, name in sorted(files)}


def left_out(top: Path, model: Path, stored: Collection[str]) -> dict[str, int]:
    """Bytes, by path, of everything below ``top`` but the files ``stored`` of the model's directory in it.

    A directory of which nothing is stored is one entry, with a slash; anything but a regular file counts 0 bytes.
    """
    prefix = "" if model == top else f"{model.relative_to(top).as_posix()}/"
    inner = {prefix + name for name in stored}
    holders = {".", *(str(folder) for name in inner for folder in PurePosixPath(name).parents)}
    sizes: Counter[str] = Counter()
    for name, file in _entries(top):
        if name not in inner and name not in holders:
            above = [str(folder) for folder in reversed(PurePosixPath(name).parents)]
            whole = next((f"{folder}/" for folder in above if folder not in holders), name)
            sizes[whole] += _size(file)
    return dict(sorted(sizes.items()))


def is_state(name: str) -> bool:
    """Whether a path inside a checkpoint is training state: training cannot resume without it."""
    *folders, last = PurePosixPath(name).parts
    folders += [last] if name.endswith("/") else []
    return _matches(last, _STATE) or any(_matches(folder, _STATE_FOLDERS) for folder in folders)


def is_tensors(name: str) -> bool:
    """Whether a file holds tensors, or an index of them: a prediction has its own, and copies none."""
    return PurePosixPath(name).suffix in _TENSORS or name.endswith(".index.json")


def _belongs(name: str, file: Path) -> bool:
    """The rule: every regular file does but a trainer's state, other checkpoints and logs, and what is too large."""
    *folders, last = name.split("/")
    if is_state(name) or _matches(last, _OTHER) or any(_matches(folder, _OTHER_FOLDERS) for folder in folders):
        return False
    if len(folders) >= DEEPEST or len(os.fsencode(name)) > LONGEST or not is_file(file):
        return False
    return file.stat().st_size <= (_MOST_TENSORS if file.suffix in _TENSORS else _MOST)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _entries(folder: Path, above: str = "", depth: int = 0) -> Iterator[tuple[str, Path]]:
    """All below a directory that is no directory, by its path inside. Links to directories are not followed."""
    try:
        with os.scandir(folder) as scan:
            entries = list(scan)
    except PermissionError:
        if not above:
            raise
        yield above.removesuffix("/"), folder
        return
    for entry in entries:
        if depth < 2 * DEEPEST and entry.is_dir(follow_symlinks=False):
            yield from _entries(folder / entry.name, f"{above}{entry.name}/", depth + 1)
        else:
            yield f"{above}{entry.name}", folder / entry.name


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size if file.is_file() else 0
    return 0
