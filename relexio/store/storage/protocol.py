"""What a store needs of its location, local or not."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from relexio.bounded import loads

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

#: Metadata of a Zarr group. That of a store's root carries the commit marker.
METADATA = "zarr.json"
#: No such file has more bytes: the tensor table of 400,000 tensors.
METADATA_BYTES = 64 << 20


class Location(Protocol):
    """What a store needs of where it is. Cheap to make, to compare, and to pickle."""

    @property
    def address(self) -> str:
        """A path, or a URL without a slash at its end."""

    @property
    def shown(self) -> str:
        """The address as it may be seen: without what is secret in it."""

    @property
    def staged(self) -> "Location":
        """Where a new store is built: beside this location, or in it where nothing can be renamed."""

    def below(self, key: str) -> "Location":
        """The location of that name below this one."""

    def exists(self) -> bool:
        """Whether anything is here."""

    def names(self) -> list[str]:
        """The names right below; none where nothing is here."""

    def nbytes(self) -> int:
        """Bytes of all files or objects below; 0 if there are none."""

    def free_bytes(self) -> int | None:
        """Free bytes; None where that is not known."""

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        """The bytes of one file or object below; None if it does not exist.

        Raises StoreError for a file that has more than ``most``; for an object the check would cost one more request.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write one file or object below, of at least a byte: whole, or not at all. A directory must have been made."""

    def discard(self, key: str) -> None:
        """Remove one file or object below, if it exists."""

    def make(self) -> None:
        """Create the directory, and those above it, where directories exist at all."""

    def empty(self) -> None:
        """Remove all that is below, and keep what holds the lock."""

    def remove(self) -> None:
        """Remove everything here, if it exists."""

    def zarr_store(self) -> "ZarrStore":
        """A Zarr store over what is below, to be written to. Raises OSError for a missing directory."""

    def locked(self, make: bool = False) -> AbstractContextManager[None]:
        """Hold the one writer's lock; ``make`` creates the directory if it is missing, but not those above it.

        Raises BusyError if another process holds it, FileNotFoundError for a missing directory.
        """

    def storage_errors(self) -> AbstractContextManager[None]:
        """Turn errors of the operating system into StorageErrors, where the location's own methods do not do so."""

    def settle(self) -> None:
        """Make everything below durable, and remove what a killed writer left unfinished."""

    def commit(self, marker: bytes) -> None:
        """Replace the commit marker: durable when this returns, and the old one or the new one at any moment."""

    def publish(self, final: "Location") -> None:
        """Give what was built here its final name. Raises ExistsError if that is taken."""

    def whole(self) -> bool:
        """Whether a result that was built here was finished."""

    def readable(self) -> bool:
        """Whether all files below may be read, as far as it can be known before they are."""

    def building(self) -> "AbstractContextManager[Location]":
        """Build a result for this location in the one given; it is whole when the context ends without an error."""


def attributes(location: Location) -> dict[str, Any]:
    """The attributes of the Zarr group at a location; none if there is no group."""
    values = parse_record(location.get(METADATA)).get("attributes")
    return values if isinstance(values, dict) else {}


def parse_record(data: bytes | None) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        record = loads(data or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
