"""What the directories of checkpoints hold and a trajectory does not: shown wherever someone may then delete them."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relexio.checkpoints.files import is_state, left_out
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.store.store import Store
from relexio.words import show

_SHOWN = 8


@dataclass(frozen=True)
class NotStoredSummary:
    """What was not stored of the checkpoints that ``of`` names, and of how many that was."""

    of: str
    count: int
    what: NotStored

    def __str__(self) -> str:
        names = sorted(_alike(self.what.files), key=is_state)  # what may be the model's first: they may be too many
        more = max(len(names) - _SHOWN, 0) + self.what.more
        text = ", ".join(names[:_SHOWN]) + (f" and {more} more" if more else "")
        each = f"{show(self.what.bytes / self.count)}{' a step' if self.count > 1 else ''}"
        state = self.of != "beside the steps" and any(map(is_state, names))  # there global_step* are other steps
        which = "them" if all(map(is_state, names)) and not self.what.more else "some of them"
        return f"{self._where}{text} ({each}){f': training cannot be resumed without {which}' if state else ''}"

    @property
    def _where(self) -> str:
        return "" if self.of.startswith("step") else f"{self.of}: "

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"of": self.of, "checkpoints": self.count, **asdict(self.what)}


def _alike(names: Iterable[str]) -> list[str]:
    """The names, those that differ in nothing but numbers as one with stars."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [group[0] if len(group) == 1 else pattern for pattern, group in alike.items()]


def recorded(store: Store) -> list[NotStoredSummary]:
    """What was not stored of steps and base, as ``convert`` recorded it."""
    records = [record for segment in store.segments for record in store.checkpoints(segment).values()]
    return [*_merged("steps", [r.not_stored for r in records]), *_merged("base", [store.base().not_stored])]


def not_stored_summary_of(record: CheckpointRecord) -> list[NotStoredSummary]:
    """What was not stored of one checkpoint, as ``convert`` recorded it."""
    return _merged("base" if record.step is None else f"step {record.step}", [record.not_stored])


def present(steps: Iterable[Checkpoint], base: Checkpoint | None, root: Path | None) -> list[NotStoredSummary]:
    """What is not stored, as it is on disk now: of steps, of a base, and what lies beside the steps."""
    steps = list(steps)
    left = _merged("steps", [NotStored.of(checkpoint.not_stored(), most=1 << 20) for checkpoint in steps])
    if base is not None:
        left += _merged("base", [NotStored.of(base.not_stored())])
    if root is not None:
        directories = [c.directory for c in steps if c.directory is not None and root in c.directory.parents]
        of_steps = {directory.relative_to(root).parts[0] for directory in directories}
        if base is not None and base.directory is not None and root.resolve() == base.directory.resolve().parent:
            of_steps.add(base.directory.resolve().name)
        beside = {name: n for name, n in left_out(root, root, ()).items() if name.split("/")[0] not in of_steps}
        left += _merged("beside the steps", [NotStored.of(beside)])
    return left


def _merged(of: str, parts: list[NotStored]) -> list[NotStoredSummary]:
    """Of several checkpoints together: the bytes of all, under each name; nothing where nothing was left out."""
    parts = [part for part in parts if part.files]
    if not parts:
        return []
    files: Counter[str] = Counter()
    for part in parts:
        files.update(part.files)
    whole = NotStored.of(files)
    more, size = whole.more + max(part.more for part in parts), sum(part.bytes for part in parts)
    return [NotStoredSummary(of, len(parts), NotStored(whole.files, more, size))]
