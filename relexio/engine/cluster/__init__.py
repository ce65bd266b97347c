"""The same graphs on a Dask cluster: an existing one, or worker processes of this machine. Imported only when needed.

Every task writes whole blocks at fixed places, so that Dask may run one again when its worker has died. A task that
raises is not tried again: it would raise again. Nothing of Dask's own is unpickled from a file.
"""

from relexio.engine.cluster.link import Link

__all__ = ["Link"]
