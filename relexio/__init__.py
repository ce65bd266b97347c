"""relexio: predict later checkpoints of an RLVR run from its first ones, inside a stated memory budget."""

from typing import TYPE_CHECKING, Any

from relexio.version import __version__

__all__ = ["Checkpoint", "Prediction", "Recorder", "Trajectory", "TrajectoryFit", "__version__", "convert", "open"]

if TYPE_CHECKING:
    from relexio.api import Checkpoint, Prediction, Trajectory, TrajectoryFit, convert, open
    from relexio.recorder import Recorder


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Load the Python API when it is first used: ``import relexio`` and ``relexio --help`` stay fast."""
    if name in __all__:
        from relexio import api, recorder

        return getattr(recorder if name == "Recorder" else api, name)
    raise AttributeError(f"module 'relexio' has no attribute {name!r}")
