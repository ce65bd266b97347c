"""Finding the checkpoints of a run: directory names that trainers write, and the user's choice of steps."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from relexio.checkpoints import chunks, dcp, delta, fsdp, lora, safetensors, torch_bin
from relexio.checkpoints.lora_state import is_around, open_state
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.trainers import INSIDE, step_of
from relexio.errors import CheckpointError, MissingError, RequestError
from relexio.words import Selection, digits

#: A checkpoint, or the directory that it is in.
Source = Path | Checkpoint


class Format(NamedTuple):
    """An input format: the files of a directory that hold a model's weights in it, by their names, and how these are opened."""

    weights: Callable[[Path], list[Path]]
    open: Callable[[Path, int | None, Path | None], Checkpoint]


#: A directory that has weights in no format is opened as this one, which says what is wrong.
_PLAIN = Format(safetensors.weight_files, safetensors.open_directory)
#: A directory is opened as the first that it has weights in. Chunks are safetensors files, and known by their names; so are
#: deltas, which are known by what is written last.
FORMATS = (
    Format(chunks.weight_files, chunks.open_directory),
    Format(delta.weight_files, delta.open_directory),
    _PLAIN,
    Format(fsdp.weight_files, fsdp.open_directory),
    Format(torch_bin.weight_files, torch_bin.open_directory),
    Format(dcp.weight_files, dcp.open_directory),
    Format(lora.weight_files, lora.open_directory),
)


def open_checkpoint(source: Source, step: int | None = None, top: Path | None = None) -> Checkpoint:
    """A checkpoint at a step (None: the base), opened if it is a directory; no tensor is read.

    ``top`` is the directory of the step, where that of the model is one in it. Raises MissingError or CheckpointError,
    naming the directory and file, for anything that is not whole.
    """
    if isinstance(source, Path):
        fitting = next((form for form in FORMATS if form.weights(source)), _PLAIN)
        found = fitting.open(source, step, top)
        return open_state(found, source) if is_around(found.tensors) and not isinstance(found, lora.Adapter) else found
    if source.step != step:
        raise CheckpointError(f"{source.label}: was given as {'the base' if step is None else f'step {step}'}")
    return source


def open_step(step: int, source: Source, root: Path | None, named: Mapping[int, Source]) -> Checkpoint:
    """Open what ``choose`` gave for a step of this root and these named directories. Raises as ``open_checkpoint``."""
    if not isinstance(source, Path):
        return open_checkpoint(source, step)
    top = named.get(step)
    return open_checkpoint(source, step, top if isinstance(top, Path) else _step_directory(source, root))


def find_steps(
    root: Path, selection: Selection | None = None, pattern: re.Pattern[str] | None = None
) -> tuple[dict[int, Path], list[str]]:
    """The step directories below ``root`` by step, sorted, and the names of directories that are none.

    ``pattern``: the names of step directories, if they have not those that trainers give. Raises MissingError if there is no
    such directory, CheckpointError if two directories claim one step.
    """
    if not root.is_dir():
        raise MissingError(f"{root}: no such directory")
    directories: dict[int, Path] = {}
    rest = []
    for path in sorted(root.iterdir(), key=lambda p: digits(p.name)):
        if not path.is_dir():
            continue
        step = step_of(path.name, pattern)
        if step is None:
            rest.append(path.name)
            continue
        if selection is not None and step not in selection:
            continue
        if step in directories and _holds_weights(path) and _holds_weights(directories[step]):
            raise CheckpointError(f"two directories for step {step}: {directories[step]} and {path}; move one away")
        if step not in directories or _holds_weights(path):  # some trainers write optimizer states beside the model
            directories[step] = path
    return {step: _model_directory(directories[step]) for step in sorted(directories)}, rest


def _model_directory(path: Path) -> Path:
    """As ``model_directory``; one that may not be read is left to whoever opens it."""
    try:
        return model_directory(path)
    except PermissionError:
        return path


def choose(
    root: Path | None,
    named: Mapping[int, Source],
    selection: Selection | None,
    pattern: re.Pattern[str] | None = None,
) -> tuple[dict[int, Source], list[str]]:
    """All chosen steps, by step: model directories below ``root``, and those (or checkpoints) named one by one.

    Raises CheckpointError if two claim one step, RequestError if nothing is chosen or a requested step is missing.
    """
    below, rest = find_steps(root, selection, pattern) if root is not None else ({}, [])
    steps: dict[int, Source] = {**below}
    for step, source in named.items():
        if step in steps:
            other = source if isinstance(source, Path) else source.label
            raise CheckpointError(f"two directories for step {step}: {steps[step]} and {other}; leave one out")
        steps[step] = model_directory(source) if isinstance(source, Path) else source
    missing = [step for step in (selection.named if selection else []) if step not in steps]
    if missing:
        where = f"{root}: " if root is not None else ""
        raise RequestError(f"{where}no checkpoint for step {', '.join(map(str, missing))}")
    if not steps:
        hint = f" among the steps {selection.text}" if selection else ""
        raise RequestError(f"{root}: no checkpoint found{hint}; {_advice(root)}")
    return dict(sorted(steps.items())), rest


def _step_directory(model: Path, root: Path | None) -> Path:
    """The directory of a step, given its model's: the one in ``root`` that holds it; the model's own if none does."""
    if root is None or root not in model.parents:
        return model
    return root / model.relative_to(root).parts[0]


def _advice(root: Path | None) -> str:
    """Advice where a directory holds no steps."""
    if root is not None and (step := step_of(root.name)) is not None:
        return f"it is itself a step; give its parent directory, or --checkpoint {step}={root}"
    below = sorted(p.parent for p in root.glob("*/*") if p.is_dir() and step_of(p.name) is not None) if root else []
    if below:
        return f"did you mean {below[0]}?"
    return (
        "step directories are named global_step_N, checkpoint-N, step_N and the like (docs/trainers.md); name others with "
        "--pattern 'iter_(\\d+)_hf', or one by one with --checkpoint STEP=PATH"
    )


def _holds_weights(path: Path) -> bool:
    return _holds_model(model_directory(path))


def _holds_model(path: Path) -> bool:
    return bool(weights(path))


def weights(path: Path) -> list[Path]:
    """The files of a directory that hold a model's weights, in whatever format; none if it holds no model."""
    return next((files for form in FORMATS if (files := form.weights(path))), [])


def model_directory(path: Path) -> Path:
    """The directory inside a step directory that holds the weights; the step directory itself if none does."""
    for inside in INSIDE:
        candidate = path / inside if inside else path
        if candidate.is_dir() and not candidate.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(
                f"{candidate}: a link that leads out of its step; put a copy in its place, or name it with --checkpoint"
            )
        if candidate.is_dir() and _holds_model(candidate):
            return candidate
    for inside in reversed(INSIDE):
        if (path / inside).is_dir():
            return path / inside
    return path
