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
        quiet, marked = self.quiet_for(step, model, stamps, now), self._is_marked(step, model, stamps)
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

    def _is_marked(self, step: int, model: Path, stamps: Stamps) -> bool:
        """Whether a marker says so that is no older than the weights: a step may be written again."""
        newest = max((time for _, _, time in stamps), default=0)
        top = self._root / model.relative_to(self._root).parts[0]
        if any(_time(folder / name) >= newest for name in MARKERS for folder in (top, model)):
            return True
        if delta.is_whole(model):
            return True
        return any(_time(self._root / name) >= newest and _number(self._root / name) >= step for name in BESIDE)


def _time(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return -1


def _number(file: Path) -> int:
    with suppress(OSError, ValueError):
        return int(file.read_text()[:20])
    return -1
