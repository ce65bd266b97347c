"""``sweep``: predictions evaluated one after the other by the user's own command, and the best of them kept."""

from relexio.sweep.candidates import Candidate, Request
from relexio.sweep.run import Prospect, Watch, prospect, sweep
from relexio.sweep.table import Result, Sweep

__all__ = ["Candidate", "Prospect", "Request", "Result", "Sweep", "Watch", "prospect", "sweep"]
