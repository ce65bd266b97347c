"""``sweep``: predictions evaluated one after the other by the user's own command, and the best of them kept."""

from relexio.sweep.candidates import Candidate, Request
from relexio.sweep.files import default_directory
from relexio.sweep.plan import SweepPlan, known_scores, prepare
from relexio.sweep.run import Watch, sweep
from relexio.sweep.table import Evaluation, Sweep

__all__ = [
    "Candidate",
    "Evaluation",
    "Request",
    "Sweep",
    "SweepPlan",
    "Watch",
    "default_directory",
    "known_scores",
    "prepare",
    "sweep",
]
