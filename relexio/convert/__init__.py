"""``convert``: checkpoints become a trajectory store, or are added to one."""

from relexio.convert.request import Conversion, Request, prepare
from relexio.convert.verify import Originals, verify
from relexio.convert.write import Converted, convert

__all__ = ["Conversion", "Converted", "Originals", "Request", "convert", "prepare", "verify"]
