"""The import rule of setup.cfg holds, the command line needs little, and heavy packages wait until they are needed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_imports_point_down() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom relexio.cli.main import main\n"
        "heavy = {'zarr', 'dask', 'cupy', 'rich', 'safetensors', 'matplotlib', 'altair', 'jinja2', 'vl_convert'}\n"
        "try: main(['--help'])\n"
        "finally: print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]")
