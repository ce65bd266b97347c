"""Finding the checkpoints of a run: directory names that trainers write, and the user's choice of steps."""

import re
from pathlib import Path

from relexio.checkpoints.files import is_file
from relexio.checkpoints.read import INDEX, weight_files
from relexio.errors import CheckpointError, MissingError, RequestError
from relexio.words import Selection, digits

_STEP = re.compile(r"(?:global_step_?|checkpoint-|step_|step-)(\d{1,15})(?:_hf)?")
_INSIDE = ("", "huggingface", "actor/huggingface", "actor")


def find_steps(root: Path, selection: Selection | None = None) -> tuple[dict[int, Path], list[str]]:
    """The step directories below ``root`` by step, sorted, and the names of directories that are none.

    Raises MissingError if there is no such directory, CheckpointError if two directories claim one step.
    """
    if not root.is_dir():
        raise MissingError(f"{root}: no such directory")
    found: dict[int, Path] = {}
    others = []
    for path in sorted(root.iterdir(), key=lambda p: digits(p.name)):
        if not path.is_dir():
            continue
        match = _STEP.fullmatch(path.name)
        if not match:
            others.append(path.name)
            continue
        step = int(match[1])
        if selection is not None and step not in selection:
            continue
        if step in found and _holds_weights(path) and _holds_weights(found[step]):
            raise CheckpointError(f"two directories for step {step}: {found[step]} and {path}; move one away")
        if step not in found or _holds_weights(path):  # some trainers write optimizer states beside the model
            found[step] = path
    return {step: model_directory(found[step]) for step in sorted(found)}, others


def choose(root: Path | None, named: dict[int, Path], selection: Selection | None) -> tuple[dict[int, Path], list[str]]:
    """All chosen step directories by step, those below ``root`` and those named one by one.

    Raises CheckpointError if two claim one step, RequestError if nothing is chosen or a wanted step is not there.
    """
    steps, others = find_steps(root, selection) if root is not None else ({}, [])
    for step, path in named.items():
        if step in steps:
            raise CheckpointError(f"two directories for step {step}: {steps[step]} and {path}; leave one out")
        steps[step] = model_directory(path)
    missing = [step for step in (selection.named if selection else []) if step not in steps]
    if missing:
        where = f"{root}: " if root is not None else ""
        raise RequestError(f"{where}no checkpoint for step {', '.join(map(str, missing))}")
    if not steps:
        hint = f" among the steps {selection.text}" if selection else ""
        raise RequestError(f"{root}: no checkpoint found{hint}; {_advice(root)}")
    return dict(sorted(steps.items())), others


def step_directory(model: Path, root: Path | None) -> Path:
    """The directory of a step, given its model's: the one in ``root`` that holds it; the model's own if none does."""
    if root is None or root not in model.parents:
        return model
    return root / model.relative_to(root).parts[0]


def _advice(root: Path | None) -> str:
    """What to do where a directory holds no steps."""
    if root is not None and (match := _STEP.fullmatch(root.name)):
        return f"it is itself a step; give its parent directory, or --checkpoint {match[1]}={root}"
    below = sorted(p.parent for p in root.glob("*/*") if p.is_dir() and _STEP.fullmatch(p.name)) if root else []
    if below:
        return f"did you mean {below[0]}?"
    return (
        "step directories are named global_step_N, global_stepN_hf, checkpoint-N, step_N or step-N; "
        "name others with --checkpoint STEP=PATH"
    )


def _holds_weights(path: Path) -> bool:
    inside = model_directory(path)
    return is_file(inside / INDEX) or bool(weight_files(inside))


def model_directory(path: Path) -> Path:
    """The directory inside a step directory that holds the weights; the step directory itself if none does."""
    for inside in _INSIDE:
        candidate = path / inside if inside else path
        if candidate.is_dir() and not candidate.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(
                f"{candidate}: a link out of its step; put a copy in its place, or name it with --checkpoint"
            )
        if candidate.is_dir() and (is_file(candidate / INDEX) or weight_files(candidate)):
            return candidate
    for inside in reversed(_INSIDE):
        if (path / inside).is_dir():
            return path / inside
    return path
