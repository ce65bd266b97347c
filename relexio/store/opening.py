"""Opening a trajectory store. What the commit marker does not list does not exist."""

from dataclasses import replace
from pathlib import Path

from relexio.checkpoints.record import is_count, require
from relexio.errors import MissingError, StoreError
from relexio.store.schema import (
    MOST_NAMES,
    block_from_json,
    check_format,
    hashes_from_json,
    segments_from_json,
    tensors_from_json,
)
from relexio.store.seal import damage, unseal
from relexio.store.storage import METADATA, Location, attributes, locate
from relexio.store.store import Store


def open_store(path: str | Path) -> Store:
    """Open a trajectory store at its last commit.

    Raises MissingError if nothing exists, StoreError if it is not a finished trajectory, or of a newer format.
    """
    location = locate(path)
    address = location.shown
    if not location.exists():
        if location.staged.exists():
            raise MissingError(
                f"{address}: its convert was interrupted; run the same relexio convert again to finish it"
            )
        raise MissingError(f"{address}: no such trajectory; make one with relexio convert")
    if location.get(METADATA) is None:
        raise StoreError(f"{address}: not a relexio trajectory (it has no zarr.json)")
    store = None if has_begun(location) else _open(location)
    if store is None or not store.segments:
        raise StoreError(f"{address}: an unfinished conversion; run the same relexio convert again to finish it")
    return store


def has_begun(location: Location) -> bool:
    """Whether a conversion has begun right at a location that cannot be renamed, and has committed nothing."""
    if location.staged != location:
        return False
    marker = attributes(location).get("relexio")
    return isinstance(marker, dict) and marker.get("segments") == []


def unfinished_store(location: Location) -> Store | None:
    """The store that an interrupted ``convert`` left where it was staged; None if there is none to continue."""
    try:
        store = _open(location) if location.get(METADATA) is not None else None
    except StoreError:
        return None
    return store if store is not None and not store.segments else None


def _open(location: Location) -> Store:
    with damage(f"{location.shown}/{METADATA}"):
        record = check_format(unseal(location.get(METADATA) or b""), location.shown)
    with damage(location.shown):
        segments, hashes = segments_from_json(record["segments"]), hashes_from_json(record["metadata"])
        number, seal = record["next"], str(record["seal"])
        require(
            is_count(number) and number < MOST_NAMES and all(int(segment.name) < number for segment in segments),
            "names are not used twice",
        )
        store = Store(
            location.address,
            block_from_json(record["block"]),
            (),
            segments,
            str(record["base_content"]),
            hashes,
            number,
            seal,
        )
        table = store.node("base")["attributes"]["tensors"]
        store = replace(store, tensors=tensors_from_json(table, store.block))
    for kind in store.block_counts:  # one look here, or every block would find it out by itself
        store.array(f"base/{kind}/bits")
    return store
