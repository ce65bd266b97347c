"""The program starts here: Ctrl-C is handled before anything large is imported."""

import os
import signal
import sys
import warnings
from types import FrameType

from relexio.cli import INTERRUPTED


class _Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises. Python remembers a plain KeyboardInterrupt that has passed through an import, and kills itself."""


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line and 130 at any moment, also while it starts and ends."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not as under nohup, or embedded
    if ours:
        signal.signal(signal.SIGINT, _leave)  # nothing is written yet, so there is nothing to clean up
    from relexio.cli.main import main as command_line

    if not ours:
        command_line()
        return
    try:
        signal.signal(signal.SIGINT, _interrupt)
        command_line()
    except SystemExit as end:
        # What is left is Python's own end. After Ctrl-C a second one need not wait for it; after the work is done it
        # is too late to interrupt.
        signal.signal(signal.SIGINT, _leave if end.code == 130 else signal.SIG_IGN)
        if end.code == 130:
            warnings.simplefilter("ignore")  # of what Zarr had under way, and nobody waits for now
        raise
    except KeyboardInterrupt:
        _leave()


def _interrupt(number: int, frame: FrameType | None) -> None:
    sys.unraisablehook = lambda _: None  # what is cut off half-made, as an event loop, complains when it is thrown away
    raise _Interrupted


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)
