"""``sweep``: predictions evaluated one after the other by the user's own command, and the best of them kept."""

from relexio.sweep.candidates import Candidate, Request
from relexio.sweep.plan import SweepPlan, prepare
from relexio.sweep.run import Watch, sweep
from relexio.sweep.table import Evaluation, Sweep

__all__ = ["Candidate", "Evaluation", "Request", "Sweep", "SweepPlan", "Watch", "prepare", "sweep"]
