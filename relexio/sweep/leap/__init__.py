"""``leap``: train a segment, extrapolate, evaluate, and train on from the best; round after round."""

from relexio.sweep.leap.request import Request
from relexio.sweep.leap.run import Events, leap
from relexio.sweep.leap.table import Leap, Round

__all__ = ["Events", "Leap", "Request", "Round", "leap"]
