"""Where a trajectory is: a local directory, or an address that fsspec knows (``s3://bucket/run.zarr``, ``gs://`` ...).

All that differs between the two is here. A directory is built beside its final name and renamed. Objects cannot be
renamed: they are written under their final names at once, and the commit marker alone says what exists.
"""

import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from relexio.errors import RequestError
from relexio.store.storage.local import LocalStorage
from relexio.store.storage.objects import LOCK, ObjectStorage
from relexio.store.storage.protocol import METADATA, Location, attributes
from relexio.words import shown

__all__ = ["LOCK", "METADATA", "LocalStorage", "Location", "ObjectStorage", "attributes", "local", "locate"]

_URL = re.compile(r"[A-Za-z][\w+.:-]*://")


@lru_cache(maxsize=256)
def locate(address: str | Path) -> Location:
    """The location of an address: a URL for fsspec, else a path. Raises RequestError for a URL that cannot be one."""
    text = str(address)
    if not _URL.match(text):
        return LocalStorage(str(Path(text)))
    if text.startswith("file://"):
        return LocalStorage(str(Path(text.removeprefix("file://"))))
    if set("*?[") & set(text):
        raise RequestError(f"{shown(text)}: fsspec takes *, ? and [ for patterns; give the trajectory another name")
    if not _URL.match(text.rstrip("/")):
        raise RequestError(f"{shown(text)}: names no trajectory")
    if text.startswith(("http://", "https://")):
        try:
            urlsplit(text).port  # noqa: B018  it raises
        except ValueError as error:
            raise RequestError(f"{shown(text)}: its port is not a number up to 65535; correct the address") from error
    return ObjectStorage(text.rstrip("/"))


def local(path: str | Path) -> Path:
    """The path of a checkpoint. Raises RequestError for a URL: those are on local disk."""
    if _URL.match(str(path)):
        raise RequestError(
            f"{shown(str(path))}: only trajectories can be on object storage; give a local directory for checkpoints"
        )
    return Path(path)
