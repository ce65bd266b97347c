"""The program starts here: what asks it to end is handled before anything large is imported."""

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any

from relexio.cli import INTERRUPTED

_PATIENCE = 10  # seconds for cleaning up
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class _Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises. Python remembers a plain KeyboardInterrupt that has passed through an import, and kills itself."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


def main() -> None:
    """Run the command line. What asks it to end (Ctrl-C: 130, SIGTERM: 143, SIGHUP: 129) ends it with one line at any moment.

    Also while it starts and ends, and as the first process of a container, which nobody else ends.
    """
    # not those that somebody ignores, as nohup does, or handles, where this is embedded
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) in _DEFAULTS]
    _handle(numbers, _leave)  # nothing is written yet, so there is nothing to clean up
    from relexio.cli.main import main as command_line

    try:
        _handle(numbers, _interrupt)
        command_line()
    except SystemExit as end:
        # What is left is Python's own end. After Ctrl-C a second one need not wait for it; after the work is done it
        # is too late to interrupt.
        stopped = end.code in {128 + number for number in numbers}
        _handle(numbers, _leave if stopped else signal.SIG_IGN)
        if stopped:
            warnings.simplefilter("ignore")  # of what Zarr had under way, and nobody waits for now
        raise
    except KeyboardInterrupt as stop:
        _leave(getattr(stop, "code", 130) - 128)


def _handle(numbers: list[signal.Signals], handler: Any) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    sys.unraisablehook = lambda _: None  # what is cut off half-made, as an event loop, complains when it is thrown away
    # Python drops what is raised while it throws an object away; and work that follows a run would go on for days.
    signal.signal(signal.SIGALRM, lambda *_: _leave(number))
    signal.alarm(_PATIENCE)
    raise _Interrupted(number)


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)
