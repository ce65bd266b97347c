"""What the network and object storage may raise, as StorageErrors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EROFS

from relexio.errors import RelexioError, StorageError
from relexio.words import without_secrets

#: What the network may raise besides OSError, by the module that has it; where that is not loaded, none can come.
_NETWORK = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}


@contextmanager
def storage_errors_of(address: str) -> Iterator[None]:
    """Turn what the network and the storage say into one StorageError. A missing object is for the caller to judge."""
    try:
        yield
    except RelexioError:
        raise
    except _network() as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        code = _code(error)
        advice = "check the address, the credentials and the network, and run the same command again"
        if code == EROFS:
            reason, advice = "can be read, not written", "give another place"
        reason = without_secrets(f"{address}: {reason}", address)
        failure = StorageError(f"{reason}; {advice}")
        failure.errno = code
        raise failure from error


def _code(error: Exception) -> int | None:
    """The system's number for an error: also where it came over HTTP, or as a way to write that fsspec has not got."""
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return EACCES
    if isinstance(error, NotImplementedError) or status in (405, 501):
        return EROFS
    return getattr(error, "errno", None)


def _network() -> tuple[type[Exception], ...]:
    loaded = {sys.modules[module]: names for module, names in _NETWORK.items() if module in sys.modules}
    return (
        OSError,
        NotImplementedError,
        *(getattr(module, name) for module, names in loaded.items() for name in names),
    )
