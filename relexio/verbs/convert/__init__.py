"""``convert``: checkpoints become a trajectory store, or are added to one."""

from relexio.verbs.convert.request import Conversion, Request, prepare
from relexio.verbs.convert.write import ConversionResult, convert

__all__ = ["Conversion", "ConversionResult", "Request", "convert", "prepare"]
