"""The store's metadata, and its hashes: Zarr gives chunks a checksum, but no ``zarr.json``.

The root's ``zarr.json`` holds the hashes of all others, and one of itself.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from xxhash import xxh3_128_hexdigest

from relexio.bounded import loads
from relexio.errors import StoreError
from relexio.store.schema import FORMAT
from relexio.store.storage import METADATA, Location

Json = dict[str, Any]
_BLANK = "0" * 32


def hash_of(data: bytes) -> str:
    """XXH3 of some bytes: 128 bits, 32 hexadecimal digits."""
    return xxh3_128_hexdigest(data)


def seal(record: Json, **more: Any) -> bytes:
    """The ``zarr.json`` of a group with a record (and more attributes), in it (``seal``) the hash of all, itself as zeros."""
    text = _group({"relexio": {**record, "format": FORMAT, "seal": _BLANK}, **more})
    return text.replace(_BLANK.encode(), hash_of(text).encode())


def _group(attributes: Json) -> bytes:
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def unseal(data: bytes) -> Json:
    """The attributes in such a ``zarr.json``. Raises ValueError where it is not as it was written.

    A store of another format, or anything else, is not checked; nor is what ``zarr.consolidate_metadata`` added.
    """
    node = _parse(data)
    attributes: Json = node.get("attributes", {})
    record = attributes.get("relexio")
    if isinstance(record, dict) and record.get("format") == FORMAT:
        if "consolidated_metadata" in node:
            data = _group(attributes)
        seal = str(record.get("seal")).encode()
        if len(seal) != len(_BLANK) or hash_of(data.replace(seal, _BLANK.encode())).encode() != seal:
            raise ValueError("a checksum is wrong")
    return attributes


def read_node(location: Location, path: str, known: str | None) -> Json:
    """The ``zarr.json`` of a group or array. Raises ValueError where it is missing, or its hash is wrong."""
    data = location.get(f"{path}/{METADATA}")
    if data is None:
        raise ValueError("it is missing")
    if known is not None and hash_of(data) != known:
        raise ValueError("a checksum is wrong")
    return _parse(data)


def _parse(data: bytes) -> Json:
    node = loads(data)
    if not isinstance(node, dict) or not isinstance(node.get("attributes", {}), dict):
        raise ValueError("it is not Zarr metadata")
    return node


def metadata_hashes(location: Location, paths: Iterable[str]) -> dict[str, str]:
    """The hash of the ``zarr.json`` of groups and arrays, and of the files of chunks, by their paths from the root.

    Raises StoreError for one that is not there, or is no JSON: a run that was cut off by a power loss may have left it so.
    """
    hashes = {}
    for path in paths:
        data = location.get(file_of(path)) or b""
        with damage(f"{location.shown}/{file_of(path)}", "run the same command again"):
            if file_of(path) != path:
                _parse(data)
            elif not data:
                raise ValueError("it is missing")
        hashes[path] = hash_of(data)
    return hashes


def file_of(path: str) -> str:
    """The file that stands for a path: a chunk's own, or the ``zarr.json`` of a group or array."""
    return path if "/c/" in path else f"{path}/{METADATA}"


@contextmanager
def damage(what: str, advice: str = "take it from a copy, or convert again into a new trajectory") -> Iterator[None]:
    """Turn what is wrong with records and chunks of a damaged store into one StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise StoreError(f"{what}: damaged ({reason}); {advice}") from error
