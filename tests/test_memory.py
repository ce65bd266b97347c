"""Peak resident memory of every command, in a fresh process, stays under what the user allowed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relexio.words import parse_size
from tests.support.command import in_process
from tests.support.make import BF16, write_dense_run

#: Runs the command line, then says the highest resident size that the kernel saw.
MEASURED = """
import atexit, re, sys
from pathlib import Path
from relexio.cli.main import main
atexit.register(lambda: print("PEAK", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr))
main(sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def peak(*arguments: object) -> int:
    """Bytes resident at most while a command ran in a process of its own."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = re.search(r"PEAK (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1]) * 1024


def check(tmp_path: Path, allowed: str, dense: int) -> None:
    run, budget = tmp_path / "run.zarr", parse_size(allowed)
    assert dense >= 5 * budget, "the case must be one that cannot be held in memory"
    options = ("--memory", allowed, "--workers", 2)
    convert = ("convert", tmp_path / "steps", "--base", tmp_path / "base", "-o", run, *options)
    predict = ("predict", run, "--method", "relex", "--step", 5000, "-o", tmp_path / "out", *options)
    again = (
        "predict",
        run,
        "--method",
        "relex",
        "--step",
        6000,
        "--solver",
        "blocks",
        "-o",
        tmp_path / "again",
        *options,
    )
    told = [(name, run, *options) for name in ("inspect", "backtest", "findings")]
    for command in (convert, predict, again, *told):
        found = peak(*command)
        assert found <= budget, f"{command[0]}: {found / 1e6:.0f} MB where {allowed} are allowed"


@pytest.mark.slow
def test_window_of_many_elements(tmp_path: Path) -> None:
    write_dense_run(tmp_path, 9_000_000, 40, BF16)
    check(tmp_path, "256MB", dense=9_000_000 * 40 * 4)
    page = ("report", tmp_path / "run.zarr", "-o", tmp_path / "run.html", "--png", tmp_path / "figures")
    assert peak(*page, "--memory", "512MB") <= 512_000_000
    refused = in_process(*page[:3], tmp_path / "no.html", "--memory", "256MB")
    assert refused.code == 1 and "too small" in refused.err and not (tmp_path / "no.html").exists()


@pytest.mark.slow
def test_files_larger_than_the_memory(tmp_path: Path) -> None:
    """Files are stored and written again a chunk at a time; those of the base count too."""
    write_dense_run(tmp_path, 1_000, 3, BF16)
    large = np.random.default_rng(0).bytes(250_000_000)
    (tmp_path / "base" / "tokenizer").write_bytes(large)
    run = tmp_path / "run.zarr"
    for command in (
        ("convert", tmp_path / "steps", "--base", tmp_path / "base", "-o", run),
        ("restore", run, "--step", "base", "-o", tmp_path / "back"),
        ("predict", run, "--method", "relex", "--step", 9, "-o", tmp_path / "out"),
        ("verify", run, "--base", tmp_path / "base"),
    ):
        assert peak(*command, "--memory", "200MB", "--workers", 1) <= 200_000_000, command[0]
    assert (tmp_path / "back/tokenizer").read_bytes() == large == (tmp_path / "out/tokenizer").read_bytes()


@pytest.mark.slow
def test_window_of_300_steps(tmp_path: Path) -> None:
    write_dense_run(tmp_path, 1_400_000, 300, BF16)
    check(tmp_path, "320MB", dense=1_400_000 * 300 * 4)


@pytest.mark.slow
def test_fp32_at_half_a_gigabyte(tmp_path: Path) -> None:
    write_dense_run(tmp_path, 16_000_000, 40, np.dtype("float32"))
    check(tmp_path, "512MB", dense=16_000_000 * 40 * 4)


@pytest.mark.slow
def test_steps_added_one_at_a_time(tmp_path: Path) -> None:
    """Many segments are read at once; a merge makes one of eight in the same memory."""
    write_dense_run(tmp_path, 3_000_000, 30, BF16)
    run = tmp_path / "run.zarr"
    for step in range(1, 31):
        extra = ("--base", tmp_path / "base") if step == 1 else ()
        peak("convert", tmp_path / "steps", *extra, "--steps", step, "-o", run, "--memory", "256MB")
    for command in (("predict", run, "--method", "relex", "--step", 900, "-o", tmp_path / "out"), ("inspect", run)):
        assert peak(*command, "--memory", "256MB") <= 256_000_000


@pytest.mark.slow
def test_a_run_that_is_followed(tmp_path: Path) -> None:
    """75 steps, each written when the one before is stored, in one process that deletes them again."""
    write_dense_run(tmp_path, 1_000_000, 75, BF16)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("75")
    options = ("--follow", "--until", "75", "--delete-verified", "--memory", "192MB")
    command = ("convert", tmp_path / "run", "--base", tmp_path / "base", "-o", tmp_path / "run.zarr", *options)
    lines, measured = [], [sys.executable, "-c", MEASURED, *map(str, command)]
    with subprocess.Popen(measured, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            lines.append(line)
            if found := re.match(r"waiting for the first|step (\d+) stored", line):
                following = tmp_path / "steps" / f"global_step_{int(found[1] or 0) + 1}"
                if following.exists():
                    following.rename(tmp_path / "run" / following.name)
    assert process.returncode == 0, lines[-4:]
    peaks = [int(found[1]) * 1024 for line in lines if (found := re.match(r"PEAK (\d+)", line))]
    assert peaks[0] <= 192_000_000, f"{peaks[0] / 1e6:.0f} MB"
    assert not [*(tmp_path / "run").glob("*/*.safetensors")]


def test_free_pages_of_a_heap_with_holes_are_given_back() -> None:
    """Small results between tiles that are gone, as those of blocks are, do not keep the memory of the tiles."""
    program = """
import numpy as np
from relexio.engine.process import keep_within, resident_bytes, use_one_heap
use_one_heap()
before = resident_bytes()
tiles = [np.ones(1 << 20 if number % 2 else 2000, np.uint8) for number in range(200)]
small = tiles[::2]
del tiles
full = resident_bytes()
keep_within(full)
assert resident_bytes() > before + 50_000_000, (before, full)
keep_within(before)
assert resident_bytes() < before + 10_000_000, (before, full, resident_bytes())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
