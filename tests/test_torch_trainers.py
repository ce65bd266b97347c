"""Steps that accelerate and verl themselves have saved under FSDP are stored as the models are that they make of them.

tests/torch_files/make_accelerate.py and make_verl.py made the fixtures; none of these libraries is needed to read them.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from relexio.checkpoints.layout import find_steps, open_checkpoint
from relexio.checkpoints.lora_state import META
from relexio.store.opening import open_store
from tests.support.adapters import whole
from tests.support.command import Relexio, refused, snapshot
from tests.support.make import BF16, load_checkpoint, load_file, save_checkpoint

FILES = Path(__file__).parent / "torch_files"


def unpacked(name: str, out: Path) -> Path:
    (archive,) = FILES.glob(f"{name}-*.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out


@pytest.fixture
def accelerate(tmp_path: Path) -> Path:
    return unpacked("accelerate", tmp_path / "made")


@pytest.fixture
def verl(tmp_path: Path) -> Path:
    return unpacked("verl", tmp_path / "made")


def convert(relexio: Relexio, steps: Path, base: Path, out: Path) -> dict[int, str]:
    done = relexio("convert", steps, "--base", base, "-o", out)
    assert done.code == 0, done.err
    return open_store(out).contents


@pytest.mark.parametrize("case", ["fsdp2", "fsdp1", "fsdp2-full"])
def test_accelerates_states_are_what_accelerate_merges(
    accelerate: Path, tmp_path: Path, relexio: Relexio, case: str
) -> None:
    base, merged = accelerate / "base", accelerate / "merged" / case
    for step, path in find_steps(accelerate / case)[0].items():
        assert path == accelerate / case / f"checkpoint-{step}"
        wanted, found = load_checkpoint(merged / path.name), whole(open_checkpoint(path, step))
        assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in wanted.items()}
    stored = convert(relexio, accelerate / case, base, tmp_path / "run.zarr")
    assert stored == convert(relexio, merged, base, tmp_path / "merged.zarr")
    for path in merged.iterdir():  # the same in the types of the base: none of them is as the base is
        cast = {name: array.astype(BF16) for name, array in load_checkpoint(path).items()}
        save_checkpoint(tmp_path / "cast" / path.name, cast)
    assert stored == convert(relexio, tmp_path / "cast", base, tmp_path / "cast.zarr")
    assert list(stored) == [1, 2] and len(set(stored.values())) == 2


@pytest.mark.parametrize("case", ["fsdp1", "fsdp2", "tied"])
def test_verls_shards_are_what_verls_merger_makes_of_them(
    verl: Path, tmp_path: Path, relexio: Relexio, case: str
) -> None:
    """The merger rounds to bf16, as is done here. A head that is tied is in the shards, and in no model of verl's."""
    base, actor = verl / ("base-tied" if case == "tied" else "base"), verl / case / "global_step_1" / "actor"
    shutil.copytree(verl / "merger" / case, tmp_path / "merged" / "global_step_1")
    stored = [convert(relexio, tmp_path / "merged", base, tmp_path / "merged.zarr")]
    if case != "fsdp1":  # of which there is no hf_model
        assert find_steps(verl / case)[0] == {1: actor / "huggingface"}
        stored.append(convert(relexio, verl / case, base, tmp_path / "hf.zarr"))
        (actor / "huggingface" / "model.safetensors").unlink()
    assert find_steps(verl / case)[0] == {1: actor}
    stored.append(convert(relexio, verl / case, base, tmp_path / "shards.zarr"))
    assert all(contents == stored[0] for contents in stored)


def merged(verl: Path, case: str) -> dict[str, np.ndarray]:
    return load_file(verl / "merged" / f"{case}.safetensors")


@pytest.mark.parametrize("case", ["lora-fsdp1", "lora-fsdp2", "lora-hf"])
def test_verls_lora_is_what_peft_merges(verl: Path, case: str) -> None:
    """What verl calls the hf_model of LoRA has the names of the state dict, and is no model that transformers reads."""
    path = find_steps(verl / case)[0][1]
    assert path.name == ("huggingface" if case == "lora-hf" else "actor")
    found, wanted = whole(open_checkpoint(path, 1)), merged(verl, case)
    assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in wanted.items()}


def test_a_run_of_verl_with_lora(verl: Path, tmp_path: Path, relexio: Relexio) -> None:
    """All are the merged model in the types of the base; none comes back as the files that it was."""
    cases = ("lora-fsdp1", "lora-fsdp2", "lora-hf", "lora-only")
    for step, case in enumerate(cases, 1):
        shutil.move(verl / case / "global_step_1", tmp_path / "run" / f"global_step_{step}")
        cast = {name: array.astype(BF16) for name, array in merged(verl, case).items()}
        save_checkpoint(tmp_path / "cast" / f"global_step_{step}", cast)
    stored = convert(relexio, tmp_path / "run", verl / "base", tmp_path / "run.zarr")
    assert stored == convert(relexio, tmp_path / "cast", verl / "base", tmp_path / "cast.zarr")
    assert len(stored) == len(cases) and len(set(stored.values())) == 1
    verified = relexio("verify", tmp_path / "run.zarr", tmp_path / "run", "--json")
    assert verified.code == 0 and json.loads(verified.out)["compared"] == [1, 2, 3, 4]
    for step in (3, 4):
        assert relexio("restore", tmp_path / "run.zarr", "--step", step, "-o", tmp_path / f"back-{step}").code == 0
        back = load_checkpoint(tmp_path / f"back-{step}")
        assert {n: a.tobytes() for n, a in back.items()} == {
            n: a.astype(BF16).tobytes() for n, a in merged(verl, cases[step - 1]).items()
        }
    before = snapshot(tmp_path / "run")
    done = relexio("convert", tmp_path / "run", "-o", tmp_path / "run.zarr", "--delete-verified", "--json")
    assert len(json.loads(done.out)["deleted"]["left"]) == len(cases) and snapshot(tmp_path / "run") == before


def test_a_model_with_names_as_peft_has_them_is_a_model(tmp_path: Path, relexio: Relexio) -> None:
    """Other wrappers, such as Medusa's, have a ``base_model`` with a ``model``, too."""
    names = (
        "base_model.model.layers.0.mlp.up_proj.weight",
        "base_model.lm_head.weight",
        "medusa_head.0.0.linear.weight",
    )
    for step in (0, 1, 2):
        tensors = {name: np.full((4, 4), 1 + step / 8, np.float32) for name in names}
        save_checkpoint(tmp_path / (f"run/global_step_{step}" if step else "base"), tensors)
    assert list(convert(relexio, tmp_path / "run", tmp_path / "base", tmp_path / "run.zarr")) == [1, 2]


def test_a_model_of_verls_with_lora_around_it_says_what_it_needs(verl: Path, relexio: Relexio, tmp_path: Path) -> None:
    actor = verl / "lora-hf" / "global_step_1" / "actor"
    (actor / META).unlink()
    out = tmp_path / "run.zarr"
    done = relexio("convert", verl / "lora-hf", "--base", verl / "base", "-o", out)
    refused(done, f"no {META}", "for ALPHA: echo", '{"r": 3, "lora_alpha": ALPHA}')
    command = done.err.partition("for ALPHA: ")[2].partition(", and then this again")[0]
    subprocess.run(command.replace("ALPHA", "5"), shell=True, check=True)  # what a user would paste
    assert (actor / META).is_file()
    assert len(convert(relexio, verl / "lora-hf", verl / "base", out)) == 1
