"""What every test shares: an in-process command line, and a subprocess one; a directory that other users can reach.

None depends on how fast the machine is.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from relexio.cli.main import main
from tests.support.command import Outcome, Relexio, without_progress

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def relexio(capsys: pytest.CaptureFixture[str]) -> Relexio:
    """The command line, in this process."""

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, without_progress(err))

    return run


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that other users can reach, as those of pytest are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    folder = Path(tempfile.mkdtemp(prefix="relexio-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
