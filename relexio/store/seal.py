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
#: Where Zarr looks for a copy of all metadata below a group, so that it opens the group in one read.
_COPY = "consolidated_metadata"


def hash_of(data: bytes) -> str:
    """XXH3 of some bytes: 128 bits, 32 hexadecimal digits."""
    return xxh3_128_hexdigest(data)


def seal(record: Json, nodes: Json | None = None, **more: Any) -> bytes:
    """The ``zarr.json`` of a group with a record (and more attributes), in it (``seal``) the hash of all, itself as zeros.

    ``nodes``, the metadata of groups and arrays below by path, are put in for other readers, and are bound by their own hash.
    """
    copy = None if nodes is None else _compact({"kind": "inline", "must_understand": False, "metadata": nodes})
    bound = {} if copy is None else {"consolidated": hash_of(copy)}
    text = _group({"relexio": {**record, **bound, "format": FORMAT, "seal": _BLANK}, **more})
    text = text.replace(_BLANK.encode(), hash_of(text).encode())
    return text if copy is None else text.removesuffix(b"\n}") + b',\n  "' + _COPY.encode() + b'": ' + copy + b"\n}"


def consolidated(data: bytes) -> Json | None:
    """The metadata of groups and arrays that ``seal`` put into such a ``zarr.json``, None if they are not the same any more."""
    node = _parse(data)
    record, copy = node.get("attributes", {}).get("relexio"), node.get(_COPY)
    if not isinstance(record, dict) or "consolidated" not in record:
        return {}
    if not isinstance(copy, dict) or hash_of(_compact(copy)) != record["consolidated"]:
        return None
    nodes: Json = copy["metadata"]
    return nodes


def _compact(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _group(attributes: Json) -> bytes:
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def unseal(data: bytes) -> Json:
    """The attributes in such a ``zarr.json``. Raises ValueError where it is not as it was written.

    A store of another format, or anything else, is not checked; nor is the copy of the metadata below (``consolidated``), which
    nothing here is read from.
    """
    node = _parse(data)
    attributes: Json = node.get("attributes", {})
    record = attributes.get("relexio")
    if isinstance(record, dict) and record.get("format") == FORMAT:
        if _COPY in node:
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


def read_bound(location: Location, paths: Iterable[str]) -> Iterator[tuple[str, str, Json | None]]:
    """By path from the root, the hash of the ``zarr.json`` of groups and arrays and what is in it, or of the file of a chunk.

    Raises StoreError for one that is not there, or is no JSON: a run that was cut off by a power loss may have left it so.
    """
    for path in paths:
        data, node = location.get(file_of(path)) or b"", None
        with damage(f"{location.shown}/{file_of(path)}", "run the same command again"):
            if file_of(path) != path:
                node = _parse(data)
            elif not data:
                raise ValueError("it is missing")
        yield path, hash_of(data), node


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
