"""Hashes of the store's metadata: Zarr gives chunks a checksum, but no ``zarr.json``.

The root's ``zarr.json`` holds the hashes of all others, and one of itself.
"""

import json
from collections.abc import Iterable
from typing import Any

from xxhash import xxh3_128_hexdigest

from relexio.bounded import loads
from relexio.store.schema import FORMAT
from relexio.store.storage import METADATA, Place

Json = dict[str, Any]
_BLANK = "0" * 32


def hash_of(data: bytes) -> str:
    """XXH3 of some bytes: 128 bits, 32 hexadecimal digits."""
    return xxh3_128_hexdigest(data)


def seal(record: Json, **more: Any) -> bytes:
    """The ``zarr.json`` of a group with a record (and more attributes), in it (``seal``) the hash of all, itself as zeros."""
    attributes = {"relexio": {**record, "format": FORMAT, "seal": _BLANK}, **more}
    whole = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    text = json.dumps(whole, indent=2).encode()
    return text.replace(_BLANK.encode(), hash_of(text).encode())


def unseal(data: bytes) -> Json:
    """The attributes in such a ``zarr.json``. Raises ValueError where it is not as it was written.

    A store of another format, or something that is none, is not looked at.
    """
    attributes: Json = loads(data)["attributes"]
    record = attributes.get("relexio")
    if isinstance(record, dict) and record.get("format") == FORMAT:
        found = str(record.get("seal")).encode()
        if len(found) != len(_BLANK) or hash_of(data.replace(found, _BLANK.encode())).encode() != found:
            raise ValueError("zarr.json is not as it was written: its checksum is wrong")
    return attributes


def metadata_hashes(where: Place, nodes: Iterable[str]) -> dict[str, str]:
    """The hash of the ``zarr.json`` of groups and arrays, by their paths from the root."""
    return {node: hash_of(where.get(f"{node}/{METADATA}") or b"") for node in nodes}
