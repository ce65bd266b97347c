"""The one hierarchy of errors that relexio raises; each is also the built-in that it resembles. And its one warning."""


class RelexioError(Exception):
    """Base of every error that relexio raises on purpose. Its text says what, where, and what to do."""


class CheckpointError(RelexioError, ValueError):
    """A checkpoint directory or safetensors file that cannot be used as it is."""


class IncompleteError(CheckpointError):
    """A checkpoint of which a part is missing: still being written, or cut off."""


class BaseItselfError(CheckpointError):
    """A step that is the base itself, bit for bit: nothing has moved yet."""

    def __init__(self, text: str, step: int | None = None) -> None:
        super().__init__(text)
        self.step = step


class MissingError(RelexioError, FileNotFoundError):
    """A file or directory that was named but does not exist."""


class ExistsError(RelexioError, FileExistsError):
    """An output that exists already; nothing is ever overwritten."""


class StoreError(RelexioError, ValueError):
    """A trajectory store that is damaged, unfinished, or of another format."""


class RequestError(RelexioError, ValueError):
    """A request that the data cannot answer: a step, window, rank or tensor that does not exist."""


class OverflowedError(RequestError, OverflowError):
    """A prediction so far away that the tensor's type cannot hold it."""


class BudgetError(RelexioError, ValueError):
    """A memory budget too small for the smallest possible plan."""


class DeviceError(RelexioError, ValueError):
    """A device that was requested and is not available."""


class StorageError(RelexioError, OSError):
    """The disk or the object storage refused: full, read-only, not permitted, or gone."""


class BusyError(RelexioError, BlockingIOError):
    """Another process is writing the same store."""


class ClusterError(RelexioError, ConnectionError):
    """A Dask cluster that cannot be reached, has no workers, lost them, or whose workers cannot do this work."""


class EvaluationError(RelexioError, RuntimeError):
    """An evaluation command of the user's that failed, hung, or printed no score."""


class TrainingError(RelexioError, RuntimeError):
    """A training command of the user's that failed, or left no checkpoint."""


class RelexioWarning(UserWarning):
    """The work continues, and its result is right, but not as planned. The text says why, and what to do."""
