"""``convert``: checkpoints become a trajectory store, or are added to one."""

from relexio.convert.request import Conversion, Request, prepare
from relexio.convert.verify import Originals, find_originals, verify
from relexio.convert.write import Converted, convert

__all__ = ["Conversion", "Converted", "Originals", "Request", "convert", "find_originals", "prepare", "verify"]
