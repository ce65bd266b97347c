"""Whether a step that a running trainer writes is whole: by the trainer's own marker, or because it is left alone."""

from contextlib import suppress
from pathlib import Path

from relexio.checkpoints import delta
from relexio.checkpoints.files import INDEX
from relexio.checkpoints.layout import weights
from relexio.checkpoints.trainers import BESIDE, MARKERS

#: Name, size and time of the files that hold a step's weights.
Stamps = tuple[tuple[str, int, int], ...]


def weight_stamps(model: Path) -> Stamps:
    """Name, size and time of the weights in a model's directory; empty if there are none, or they are on their way out."""
    with suppress(OSError):
        whole = delta.is_whole(model)  # one in which nothing changed is an index, and no more
        stats = [(file.name, file.stat()) for file in weights(model) if file.name != INDEX or whole]
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return ()


#: A trainer that marks its steps may take so many times longer from one file to the next.
_MARKING = 12


class Watch:
    """What was seen of steps so far. A step without a marker is whole when its files were the same for ``quiet`` seconds, or
    for longer where other steps had a marker.

    Times of files are compared with each other only: a file server's clock may differ from ours.
    """

    def __init__(self, root: Path, quiet: float) -> None:
        self._root, self._quiet = root, quiet
        self._marks = False
        self._seen: dict[int, tuple[Stamps, float]] = {}

    def is_whole(self, step: int, model: Path, stamps: Stamps, now: float) -> bool:
        """Whether a step with files of these stamps is whole, at ``now`` (seconds)."""
        top = self._root / model.relative_to(self._root).parts[0]
        quiet, marked = self.quiet_for(step, model, stamps, now), marker_of(step, top, model, stamps) is not None
        self._marks = self._marks or marked
        return marked or quiet >= self._quiet * (_MARKING if self._marks else 1)

    def quiet_for(self, step: int, model: Path, stamps: Stamps, now: float) -> float:
        """Seconds since the weights of a step, or its index, were last seen to change."""
        state = (*stamps, (INDEX, 0, _time(model / INDEX)))
        before, since = self._seen.get(step, ((), now))
        if before != state:
            since = now
        self._seen[step] = state, since
        return now - since


def marker_of(step: int, top: Path, model: Path, stamps: Stamps) -> str | None:
    """The marker that says that a step is whole, in its directory ``top``, in its model's, or beside it; None without one.

    It is no older than the weights, whose stamps are given: a step may be written again.
    """
    if delta.is_whole(model):
        return delta.weight_files(model)[0].name  # written last
    newest = max((time for _, _, time in stamps), default=0)
    inside = (name for name in MARKERS if any(_time(folder / name) >= newest for folder in (top, model)))
    beside = (name for name in BESIDE if _time(top.parent / name) >= newest and _number(top.parent / name) >= step)
    return next(inside, None) or next(beside, None)


def _time(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return -1


def _number(file: Path) -> int:
    with suppress(OSError, ValueError):
        return int(file.read_text()[:20])
    return -1
