"""``convert``: checkpoints become a trajectory store, or are added to one."""

from relexio.verbs.convert.request import Conversion, Request, prepare
from relexio.verbs.convert.write import Converted, convert

__all__ = ["Conversion", "Converted", "Request", "convert", "prepare"]
