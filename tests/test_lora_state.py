"""FSDP shards of models with LoRA around them, as verl saves them: what the real peft makes of the same models.

tests/torch_files/make_lora.py made the fixtures; neither torch nor peft is needed to read them.
"""

import json
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.checkpoints.layout import find_steps, open_checkpoint
from relexio.checkpoints.lora_state import META
from relexio.errors import CheckpointError
from relexio.store.opening import open_store
from tests.support.adapters import CORPUS, same, whole
from tests.support.command import Relexio
from tests.support.make import BF16, Tensors, load_checkpoint, load_file, save_checkpoint

FILES = Path(__file__).parent / "torch_files"
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in FILES.glob("lora-*.tar.xz"))
WHOLE = [
    "plain-1", "more-1", "dora-1", "turned-1",
    *(f"{kind}-{world}" for kind in ("plain-fsdp1", "plain-fsdp2", "more-fsdp2", "dora-fsdp2") for world in (2, 4)),
]  # fmt: skip


@pytest.fixture(params=VERSIONS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """All that was written with one version of torch."""
    with tarfile.open(FILES / f"{request.param}.tar.xz") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    return tmp_path / "made"


def ordered(tensors: Tensors, names: Any) -> Tensors:
    return {name: tensors[name] for name in names}


def base_of(case: Path, out: Path) -> Path:
    return save_checkpoint(out, load_file(case / "base.safetensors"))


@pytest.mark.parametrize("name", WHOLE)
def test_shards_are_the_merged_model(made: Path, name: str) -> None:
    checkpoint, wanted = open_checkpoint(made / name / "actor", 3), load_file(made / name / "merged.safetensors")
    assert checkpoint.tensors.keys() == wanted.keys() == set(checkpoint.moved)
    found = whole(checkpoint)
    ulps = np.concatenate([np.abs(found[n].view("i4").astype("i8") - a.view("i4")).ravel() for n, a in wanted.items()])
    assert not ulps.max(), f"{np.mean(ulps == 0):.4f} equal, at most {ulps.max()} ulp"
    assert set(checkpoint.side) == {"config.json"}
    assert set(checkpoint.not_stored()) == {"fsdp_config.json", META}
    assert {META, *(file.path.name for file in checkpoint.files)} == {name for name, _, _ in checkpoint.fingerprints}


@pytest.mark.parametrize("name", ["more-fsdp2-2", "dora-fsdp2-4"])
def test_any_split_of_a_read_gives_the_same_bits(made: Path, name: str) -> None:
    checkpoint, rng = open_checkpoint(made / name / "actor", 3), np.random.default_rng(7)
    for tensor, array in whole(checkpoint).items():
        cuts = [0, *sorted(rng.integers(0, array.nbytes, 5)), array.nbytes]
        data = bytearray(array.nbytes)
        with checkpoint.held(tensor, 0, array.nbytes) as read:
            for first, last in pairwise(map(int, cuts)):
                read(first, memoryview(data)[first:last])
        assert data == array.tobytes(), tensor


@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_the_adapter_alone_stand_on_the_base(made: Path, tmp_path: Path, world: int) -> None:
    case = made / f"only-fsdp2-{world}"
    checkpoint = open_checkpoint(case / "actor", 3).over(open_checkpoint(base_of(case, tmp_path / "base")))
    same(whole(checkpoint), ordered(load_file(case / "merged-bf16.safetensors"), checkpoint.tensors))
    assert set(checkpoint.moved) == {n for n in checkpoint.tensors if "q_proj.weight" in n or "up_proj" in n}


def test_a_run_of_shards_is_stored_as_the_merged_models_would_be(made: Path, tmp_path: Path, relexio: Relexio) -> None:
    """Over a base in bf16, to which the merged model in fp32 is rounded. Of linear layers that is what merging in bf16 gives."""
    runs = {1: "plain-1", 2: "plain-fsdp1-2", 3: "plain-fsdp2-4", 4: "only-fsdp2-2", 5: "more-fsdp2-4"}
    base = base_of(made / "plain-1", tmp_path / "base")
    for step, name in runs.items():
        shutil.copytree(made / name / "actor", tmp_path / f"run/global_step_{step}/actor")
        merged = made / name / ("merged-bf16.safetensors" if name[:4] == "only" else "merged.safetensors")
        save_checkpoint(tmp_path / f"plain/global_step_{step}", load_file(merged))
    stored = {}
    for root in ("run", "plain"):
        done = relexio("convert", tmp_path / root, "--base", base, "-o", tmp_path / f"{root}.zarr", "--verify")
        assert done.code == 0, done.err
        stored[root] = open_store(tmp_path / f"{root}.zarr").contents
    assert list(stored["run"]) == list(runs) and stored["run"] == stored["plain"]
    assert len(set(stored["run"].values())) == 2 and stored["run"][4] == stored["run"][1]
    assert relexio("restore", tmp_path / "run.zarr", "--step", 5, "-o", tmp_path / "back").code == 0
    back = load_checkpoint(tmp_path / "back")
    wanted = load_file(made / "more-fsdp2-4/merged.safetensors")
    same(back, {name: wanted[name].astype(BF16) for name in back})
    assert relexio("verify", tmp_path / "run.zarr", tmp_path / "run").code == 0
    meta = tmp_path / f"run/global_step_3/actor/{META}"
    meta.write_text(meta.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    done = relexio("verify", tmp_path / "run.zarr", tmp_path / "run")
    assert done.code == 1 and "step 3" in done.out + done.err and "differs" in done.out + done.err


def test_an_adapter_beside_the_shards_comes_first(made: Path) -> None:
    shutil.copytree(made / "plain-1/actor", made / "run/global_step_1/actor")
    assert find_steps(made / "run")[0] == {1: made / "run/global_step_1/actor"}
    shutil.copytree(CORPUS / "plain", made / "run/global_step_1/actor/lora_adapter")
    assert find_steps(made / "run")[0] == {1: made / "run/global_step_1/actor/lora_adapter"}


@pytest.mark.parametrize("name", ["plain-fsdp1-2", "only-fsdp2-2"])
def test_without_the_scale_it_says_what_to_write(made: Path, name: str) -> None:
    """The command is run, with the alpha in it."""
    actor = made / name / "actor"
    (actor / META).unlink()
    with pytest.raises(CheckpointError, match=rf"^step 3 \({actor}\): .*no {META}") as error:
        open_checkpoint(actor, 3)
    command = str(error.value).partition("for ALPHA: ")[2].removesuffix(", and then this again")
    assert shlex.split(command)[-1] == str(actor / META)
    subprocess.run(command.replace("ALPHA", "5"), shell=True, check=True)  # what a user would paste
    assert json.loads((actor / META).read_text()) == {"r": 3, "lora_alpha": 5}
    checkpoint = open_checkpoint(actor, 3)
    if name[:4] != "only":
        same(whole(checkpoint), ordered(load_file(made / name / "merged.safetensors"), checkpoint.tensors))


def nothing(actor: Path) -> None:
    """As it was saved."""


def meta(**changed: Any) -> Callable[[Path], object]:
    def spoil(actor: Path) -> None:
        value = json.loads((actor / META).read_text())
        (actor / META).write_text(json.dumps({**value, **changed}))

    return spoil


def rename(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Other names of tensors, as long."""

    def spoil(actor: Path) -> None:
        assert len(old) == len(new)
        for file in actor.glob("*.pt"):
            data = file.read_bytes()
            assert old in data
            file.write_bytes(data.replace(old, new))

    return spoil


MERGE = ["python -m verl.model_merger merge --backend fsdp --local_dir", "merge_and_unload", "--checkpoint 3="]


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("plain-1", meta(lora_alpha=0), [META, "lora_alpha 0"]),
        ("plain-1", meta(lora_alpha="x"), [META, "lora_alpha x"]),
        ("plain-1", meta(r=True), [META, "r is True"]),
        ("plain-1", meta(r=4), [META, "r is 4", "[3, 16]", *MERGE]),
        ("plain-1", lambda a: (a / META).write_text("{"), [META, "JSON"]),
        ("ranks-1", nothing, ["r is 3", "q_proj has shape [2, 16]", *MERGE]),
        ("bias-1", nothing, ["lora_B.default.bias", "is not known to merge", "merge_and_unload"]),
        ("parameters-1", nothing, ["layers.0.mixed", "target_parameters", *MERGE]),
        ("plain-fsdp2-2", rename(b"1.q_proj.lora_A.default", b"1.q_proj.lora_A.another"), ["another", "is not known to"]),
        ("plain-1", rename(b".lora_", b".ia3__"), ["not by LoRA"]),
        ("plain-1", rename(b"layers.0.q_proj.base_layer", b"layers.0.q_proj.base_extra"), ["no weight of its own", *MERGE]),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(
    made: Path, name: str, spoil: Callable[[Path], object], words: list[str]
) -> None:
    actor = made / name / "actor"
    spoil(actor)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(actor, 3)
    text = str(error.value)
    assert str(actor) in text and "\n" not in text
    assert not [word for word in words if word not in text], text
