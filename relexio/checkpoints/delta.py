"""Versions of a delta chain, as trainers publish them when they sync weights: what changed since the version before.

Read from the source of slime 624b824 and miles 31f1ca9 (``weight_vNNNNNN``: safetensors files, then an index whose
metadata says how they are to be read), and of SkyRL a956457 (``delta-NNNNNNNN``: safetensors files, then a manifest).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from relexio.checkpoints.chain import Chain, Version
from relexio.checkpoints.delta_content import MANIFEST, PAYLOAD, Content, indexed, manifested
from relexio.checkpoints.disk import OnDisk, read_exactly
from relexio.checkpoints.files import INDEX, SINGLE, File, inside, is_file, left_out
from relexio.checkpoints.header import MAX_HEADER
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.safetensors import open_directory as open_model
from relexio.dtypes import Table
from relexio.errors import CheckpointError, IncompleteError, MissingError

_INDEXED, _MANIFESTED = re.compile(r"weight_v(\d{6,15})"), re.compile(r"delta-(\d{8,15})")
#: Keys at the beginning of the file that is written last, by its name: a directory that has them is a version.
_TELLING = {INDEX: b'"delta_encoding"', MANIFEST: b'"base_version"'}
_BEGINNING = 1 << 12
_INTERRUPTED = (
    "which the trainer writes last: it is still being written, or was interrupted; leave this step out with --steps"
)


def weight_files(path: Path) -> list[Path]:
    """The files of a directory that holds a version, first the one that is written last, if it is there yet."""
    for name in (INDEX, MANIFEST):
        if is_file(path / name):
            return [path / name, *sorted(path.glob("*.safetensors"))] if _tells(path / name) else []
    files = sorted(path.glob("*.safetensors"))
    if _INDEXED.fullmatch(path.name) and files and not is_file(path / SINGLE) and not is_file(path / "config.json"):
        return files
    return [file for file in files if PAYLOAD.fullmatch(file.name)]


def is_whole(path: Path) -> bool:
    """Whether a directory holds a version whose last file is there."""
    return weight_files(path)[:1] in ([path / INDEX], [path / MANIFEST])


def _tells(file: Path) -> bool:
    with open(file, "rb") as opened:
        return _TELLING[file.name] in opened.read(_BEGINNING)


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> "Delta":
    """Read what a version says of itself, and its headers. As ``layout.open_checkpoint``."""
    if not path.is_dir():
        raise MissingError(f"{path}: no such directory")
    if step is None:
        raise CheckpointError(
            f"{path}: holds a delta, not a model; give the model that the chain began from (slime, miles: --hf-checkpoint)"
        )
    for name, read, names in ((INDEX, indexed, _INDEXED), (MANIFEST, manifested, _MANIFESTED)):
        if is_file(path / name):
            file = inside(path, path / name)
            stat = file.stat()
            if stat.st_size > MAX_HEADER:
                raise CheckpointError(f"{file}: {stat.st_size:,} bytes, more than any version has; copy it again")
            content = read(path, file.read_bytes())
            named = names.fullmatch(path.name)
            if named and int(named[1]) != content.version:
                raise CheckpointError(f"{file}: says version {content.version}, and its directory is {path.name}")
            return Delta(path, step, content, File(file.absolute(), stat.st_size, stat.st_mtime_ns), top)
    last = INDEX if _INDEXED.fullmatch(path.name) else MANIFEST
    raise IncompleteError(f"{path}: has no {last}, {_INTERRUPTED}")


class Delta(OnDisk):
    """A version at a step. It has no tensors of its own; ``over`` its base it is a model.

    ``patches`` has what changed, by tensor; ``wanted`` the types and shapes that it says these tensors have, if it does.
    """

    def __init__(self, path: Path, step: int, content: Content, last: File, top: Path | None) -> None:
        super().__init__()
        self.path, self.step, self.directory = path, step, top or path
        self.label, self.source = f"step {step} ({path})", str(path.resolve())
        shards = tuple(File(shard.path, shard.size, shard.mtime_ns) for shard in content.shards)  # without the headers
        self.files: tuple[File, ...] = (*shards, last)
        self.side: Mapping[str, Path | bytes] = {}
        self.tensors: Table = {}
        self.version, self.encoding, self.algorithm = content.version, content.encoding, content.algorithm
        self.patches, self.wanted = content.patches, content.tensors

    def over(self, base: Checkpoint) -> Checkpoint:
        """The model at this version. Raises CheckpointError for a chain with a gap, or a base that it does not fit."""
        chain = Chain.of(base, self.path.parent.resolve())
        chain.add(self)
        start = self.version - 1
        while start not in chain.whole:
            if start not in chain.links:
                self._find(chain, start)
            else:
                start -= 1
        return Version(self, chain, self.version, start)

    def _find(self, chain: Chain, version: int) -> None:
        """Add the version before another to the chain: a delta, or a whole model that the chain goes on from."""
        after = chain.links[version + 1]
        name = f"weight_v{version:06d}" if self.files[-1].path.name == INDEX else f"delta-{version:08d}"
        path = self.path.parent / name
        if not path.is_dir():
            raise CheckpointError(
                f"{after.label}: changes version {version}, and {path} is missing; copy it again, or leave the steps "
                f"from {version + 1} on out with --steps"
            )
        if not weight_files(path):
            chain.whole[version] = chain.fitting(open_model(path, version))
            return
        delta = open_directory(path, version)
        stored = chain.base.at(version, delta.fingerprints)
        if stored is None:
            chain.add(delta)
        else:
            chain.whole[version] = stored

    def read(self, name: str, first_byte: int, out: memoryview) -> None:
        """It has no tensor to be read: its base is needed first."""
        raise CheckpointError(f"{self.label}: is a delta, and has no tensor {name}; it is read over its base")

    def frame(self, name: str, nbytes: int | None = None) -> bytes:
        """The packed change of a tensor, or the first bytes of it. Raises CheckpointError for a file that ends early."""
        patch = self.patches[name]
        path, data = self.files[patch.file].path, bytearray(min(patch.nbytes, nbytes or patch.nbytes))
        fd = self.descriptor(path, patch.start, patch.nbytes)
        try:
            read_exactly(fd, patch.start, memoryview(data), path)
        finally:
            os.close(fd)
        return bytes(data)

    def not_stored(self) -> dict[str, int]:
        """All that is in its directory: the store has the model that it makes."""
        return left_out(self.directory or self.path, self.path, ())
