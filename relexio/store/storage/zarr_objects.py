"""Zarr's store over fsspec. Zarr takes a while to import, and only what writes metadata needs it."""

from zarr.abc.store import ByteRequest, OffsetByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from relexio.store.storage.network import storage_errors_of
from relexio.words import shown


class Objects(FsspecStore):
    """Zarr's store over fsspec, which turns network errors into StorageErrors."""

    @property
    def root(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __str__(self) -> str:  # it stands in what Zarr says of damage
        return shown(self.root)

    __repr__ = __str__

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with storage_errors_of(self.root):
            return await super().get(key, prototype, byte_range or OffsetByteRequest(0))  # as in ObjectStorage.get

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        with storage_errors_of(self.root):
            await super().set(key, value, byte_range)

    async def exists(self, key: str) -> bool:
        with storage_errors_of(self.root):
            return await super().exists(key)
