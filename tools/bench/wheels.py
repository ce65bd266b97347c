"""Download what gpu.py needs on a machine without a network: Linux, x86-64, Python 3.12, with CuPy and so with NumPy.

usage: python tools/bench/wheels.py DIR

DIR must have no wheels yet. It gets those of relexio's dependencies, and of what its tests for the GPU import, in the versions
that are installed here. Exit code 1 if they are together larger than 60 MB.
"""

import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = ("pytest", "hypothesis", "ml_dtypes")
THERE = {"numpy"}
PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}
PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 37)))
MOST = 60_000_000


def needed(texts: list[str], extras: set[str], found: dict[str, str]) -> dict[str, str]:
    """The versions here of all that some requirements need, and theirs, by name."""
    for requirement in map(Requirement, texts):
        name, marker = canonicalize_name(requirement.name), requirement.marker
        wanted = marker is None or any(marker.evaluate({**PYTHON, "extra": extra}) for extra in (extras or {""}))
        if wanted and name not in THERE and name not in found:
            found[name] = version(name)
            needed(requires(name) or [], requirement.extras, found)
    return found


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if list(Path(sys.argv[1]).glob("*.whl")):
        sys.exit(f"{sys.argv[1]} has wheels already: remove them, or give another directory")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    pins = [f"{name}=={pin}" for name, pin in sorted(needed([*project["dependencies"], *TESTS], set(), {}).items())]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "--quiet"]
    options += [f"--platform={name}_x86_64" for name in PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", sys.argv[1], *pins], check=True)
    size = sum(file.stat().st_size for file in Path(sys.argv[1]).glob("*.whl"))
    print(f"{sys.argv[1]}: {len(pins)} wheels, {size / 1e6:.1f} MB")
    if size > MOST:
        sys.exit(f"larger than {MOST / 1e6:g} MB")


if __name__ == "__main__":
    main()
