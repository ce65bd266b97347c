"""LoRA adapters as input: the stored steps are the models that the real peft made of the same files (tests/adapters)."""

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from relexio import loops
from relexio.checkpoints import dora, product
from relexio.checkpoints.product import Product
from relexio.engine.resources import Resources
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.verify import find_originals, verify
from relexio.words import describe_steps
from tests.support.adapters import (
    BASES,
    CONFIG,
    CORPUS,
    PLACES,
    RUN,
    WEIGHTS,
    Q,
    back,
    merged,
    over,
    run_of,
    same,
    store_adapters,
    whole,
)
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, load_checkpoint, load_file, save_checkpoint, save_file
from tests.support.steps import CPU, fit_run, predict_run, small_blocks
from tests.test_rlvr import load  # noqa: F401  # a fixture


@pytest.mark.parametrize("case", BASES)
def test_it_is_what_peft_makes_of_it(case: str) -> None:
    """To the bit: peft's products here (torch 2.13 on x86, MKL) sum as ours do. Another BLAS may differ by an ulp."""
    checkpoint = over(CORPUS / case, CORPUS / BASES[case])
    same(whole(checkpoint), merged(case))
    base = load_file(CORPUS / BASES[case] / "model.safetensors")
    moved = {name for name, array in merged(case).items() if array.tobytes() != base[name].tobytes()}
    assert moved and moved <= set(checkpoint.moved)
    assert {name for name in checkpoint.moved if name not in moved} <= {"lm_head.weight"}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("case", BASES)
def test_any_split_of_a_read_gives_the_same_bits(case: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also ranges that begin and end within a row or an element, and whatever parts are worked on at once."""
    if small:
        monkeypatch.setattr(product, "_STRIP", 24)
        monkeypatch.setattr(product, "_PART", 20)
        monkeypatch.setattr(dora, "_ROWS", 50)
    checkpoint, rng = over(CORPUS / case, CORPUS / BASES[case]), np.random.default_rng(7)
    for name, array in merged(case).items():
        for _ in range(5):
            cuts = [0, *sorted(rng.integers(0, array.nbytes, int(rng.integers(1, 9)))), array.nbytes]
            data = bytearray(array.nbytes)
            with checkpoint.held(name, 0, array.nbytes) as read:
                for first, last in pairwise(map(int, cuts)):
                    read(first, memoryview(data)[first:last])
            assert data == array.tobytes(), name


def test_a_read_makes_only_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    sums = loops.product

    def count(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        made.append(rows.shape[1] * columns.shape[1])
        return sums(rows, columns)

    monkeypatch.setattr("relexio.checkpoints.product.product", count)
    checkpoint = over(CORPUS / "plain", CORPUS / "llama-bf16")
    checkpoint.read(f"{Q}.weight", 2 * 20, memoryview(bytearray(2 * 41)))
    assert sum(made) == 41


@pytest.mark.parametrize("place", PLACES)
def test_a_run_of_adapters_goes_through_every_verb(tmp_path: Path, relexio: Relexio, place: str) -> None:
    root, out = run_of(tmp_path, place), tmp_path / "run.zarr"
    done = relexio("convert", root, "--base", tmp_path / "base", "-o", out, "--verify")
    assert done.code == 0, done.err
    stored = open_store(out)
    assert stored.steps == tuple(RUN)
    for step, case in RUN.items():
        assert relexio("restore", out, "--step", step, "-o", tmp_path / f"back-{step}").code == 0
        same(load_checkpoint(tmp_path / f"back-{step}"), merged(case))
        # transformers would load an adapter that lies beside the model over it
        assert {p.name for p in (tmp_path / f"back-{step}").iterdir()} == {"model.safetensors", "tokenizer.json"}
        assert {WEIGHTS, CONFIG} <= {Path(name).name for name in stored.record(step).not_stored.files}
    done = relexio("verify", out, root, "--base", tmp_path / "base")
    assert done.code == 0 and "so is what is stored of the files compared" in done.out
    assert f"the weight files of {describe_steps(stored.steps)}: restore writes them as safetensors\n" in done.out
    assert relexio("predict", out, "--method", "relex", "--step", 12, "-o", tmp_path / "predicted").code == 0
    assert not list((tmp_path / "predicted").glob("adapter*"))
    assert list(load_checkpoint(tmp_path / "predicted")) == list(merged("plain"))
    before = snapshot(root)
    done = relexio("convert", root, "-o", out, "--delete-verified")
    assert "the trajectory has the model that these files make" in done.out + done.err
    assert snapshot(root) == before
    file = root / place.format(5) / WEIGHTS
    factors = load_file(file)
    factors[f"base_model.model.{Q}.lora_B.weight"] = 2 * factors[f"base_model.model.{Q}.lora_B.weight"]
    save_file(file, factors)
    done = relexio("verify", out, root)
    assert done.code == 1 and f"tensor {Q}.weight: differs" in done.out + done.err
    done = relexio("convert", root, "-o", out)
    assert "step 5 has been written again" in done.out + done.err


def test_neither_blocks_nor_workers_change_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = run_of(tmp_path)
    one = store_adapters(tmp_path / "one.zarr", root, tmp_path / "base")
    with Resources(workers=2, device="cpu") as threads:
        two = store_adapters(tmp_path / "two.zarr", root, tmp_path / "base", threads)
    assert one.contents == two.contents
    small_blocks(monkeypatch, 64, 64)
    with Resources(workers=1, device="cpu", scheduler="processes") as processes:
        three = store_adapters(tmp_path / "three.zarr", root, tmp_path / "base", processes)
        (tmp_path / "base").rename(tmp_path / "gone")
        shutil.copytree(CORPUS / "plain", tmp_path / "run" / "checkpoint-12")
        three = store_adapters(tmp_path / "three.zarr", root, None, processes)
    for step, case in {**RUN, 12: "plain"}.items():
        same(back(three, step, tmp_path / f"three-{step}"), merged(case))


def test_adapters_and_models_go_together(tmp_path: Path) -> None:
    root = run_of(tmp_path, steps={1: "plain", 3: "patterns"})
    save_checkpoint(root / "checkpoint-2", merged("bf16"))
    shutil.copy(CORPUS / "plain" / WEIGHTS, root / "checkpoint-2")  # what is beside a model is not the model
    stored = store_adapters(tmp_path / "run.zarr", root, tmp_path / "base")
    for step, case in {1: "plain", 2: "bf16", 3: "patterns"}.items():
        same(back(stored, step, tmp_path / f"back-{step}"), merged(case))
    assert [stored.record(step).from_safetensors for step in stored.steps] == [False, True, False]


def test_what_is_stored_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is looked at often: sizes and times show that an adapter is the stored one; in a copy, its bits do."""
    root, out = run_of(tmp_path), tmp_path / "run.zarr"
    store_adapters(out, root, tmp_path / "base")
    made: list[int] = []
    add = Product.add_to

    def count(*given: Any) -> None:
        made.append(1)
        add(*given)

    monkeypatch.setattr(Product, "add_to", count)
    assert not [
        note for note in prepare(Request(out, None, root), CPU, silent).notes if "again" in note and "since" in note
    ]
    assert not made
    os.utime(root / "checkpoint-1" / WEIGHTS, ns=(1, 1))
    assert not [note for note in prepare(Request(out, None, root), CPU, silent).notes if "written again" in note]
    assert made


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = run_of(tmp_path), tmp_path / "run.zarr"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def begin() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("relexio.verbs.convert.write._commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store_adapters(out, root, tmp_path / "base")

    begin()
    assert convert(prepare(Request(out, tmp_path / "base", root), CPU, silent), silent).resumed
    shutil.rmtree(out)
    begin()
    shutil.copy(CORPUS / "plain" / WEIGHTS, root / "checkpoint-2")
    shutil.copy(CORPUS / "plain" / CONFIG, root / "checkpoint-2")
    again = convert(prepare(Request(out, tmp_path / "base", root), CPU, silent), silent)
    assert not again.resumed
    same(back(again.store, 2, tmp_path / "back"), merged("plain"))


def test_a_run_is_followed(tmp_path: Path, relexio: Relexio) -> None:
    root, out = run_of(tmp_path), tmp_path / "run.zarr"
    for step in RUN:
        (root / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    shutil.move(root / "checkpoint-9", tmp_path / "last")
    assert relexio("convert", root, "--base", tmp_path / "base", "-o", out, "--follow", "--until", 5).code == 0
    shutil.rmtree(tmp_path / "base")
    shutil.move(tmp_path / "last", root / "checkpoint-9")
    done = relexio("convert", root, "-o", out, "--follow", "--until", 9)
    assert done.code == 0, done.err
    same(back(open_store(out), 9, tmp_path / "back"), merged("whole"))


def test_a_prediction_is_that_of_the_same_models(tmp_path: Path) -> None:
    root = run_of(tmp_path)
    for step, case in RUN.items():
        save_checkpoint(tmp_path / "models" / f"checkpoint-{step}", merged(case))
    found = [
        load_checkpoint(
            predict_run(fit_run(store_adapters(tmp_path / f"{n}.zarr", of, tmp_path / "base")), 12, tmp_path / f"{n}")
        )
        for n, of in enumerate((root, tmp_path / "models"))
    ]
    same(*found)


@pytest.mark.hf
@pytest.mark.filterwarnings("default:::(?!relexio)")
def test_a_grpo_run_of_trl_is_what_peft_makes_of_it(load: Callable[[str], ModuleType], tmp_path: Path) -> None:  # noqa: F811
    """Its adapters as the Trainer saves them; shares of equal bits are printed, and at most 1 ulp may be between."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[hf]'")
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[rlvr]'")
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
    transformers = pytest.importorskip("transformers")
    from tests.test_callback import grpo, recorder

    train, task = load("train"), load("tasks").TASKS["add"]
    torch.manual_seed(0)
    train.save(train.new_model(task, hidden=32, layers=1), tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4)
    trainer = grpo(
        train, task, str(tmp_path / "base"), tmp_path / "out", [recorder(tmp_path / "recorded.zarr")], peft_config=lora
    )
    trainer.args.set_save(strategy="steps", steps=1)
    trainer.train()
    stored = store_adapters(tmp_path / "run.zarr", tmp_path / "out", tmp_path / "base")
    assert (
        stored.contents == open_store(tmp_path / "recorded.zarr").contents
    )  # merged in memory, by peft's own functions
    assert stored.steps == (1, 2) and len(set(stored.contents.values())) == 2
    assert not verify(stored, find_originals(stored, tmp_path / "out", None), CPU, silent).problems
    for step in stored.steps:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "out" / f"checkpoint-{step}").merge_and_unload()
        model.save_pretrained(tmp_path / f"peft-{step}")
        found, wanted = back(stored, step, tmp_path / f"back-{step}"), load_checkpoint(tmp_path / f"peft-{step}")
        ulps = np.concatenate([_ulps(found[name], array) for name, array in wanted.items()])
        print(f"step {step}: {np.mean(ulps == 0):.6f} of {ulps.size} equal, at most {ulps.max()} ulp")
        assert ulps.max() <= 1 and np.mean(ulps == 0) > 0.999


def _ulps(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many numbers of bf16 are between elements."""
    assert found.dtype == wanted.dtype == BF16
    bits = [array.reshape(-1).view(np.int16).astype(np.int64) for array in (found, wanted)]
    one, other = (np.where(b < 0, -(b & 0x7FFF), b) for b in bits)
    return np.abs(one - other)
