"""Side files: a prediction has those of the last observed step, and notes name only differences that matter."""

import json
from pathlib import Path

import pytest

from relexio.checkpoints.side import TEMPLATE, TOKENIZER, differences
from tests.support.command import Relexio
from tests.support.make import CONFIG, Run, load_checkpoint, make_run, save_checkpoint
from tests.support.steps import fit_run, predict_run, store_run

PLAIN, TRAINED = "{{ messages }}", "<think>{{ messages }}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(10, 20, 30))


def _give(run: Run, files: dict[str, str], *steps: int) -> None:
    """Side files for some steps, for the base where none is named."""
    for path in [run.steps_path / f"global_step_{step}" for step in steps] or [run.base_path]:
        for name, text in files.items():
            (path / name).write_text(text)


def _predicted(run: Run, tmp_path: Path, window: str | None = None) -> Path:
    return predict_run(fit_run(store_run(run, tmp_path / "run.zarr"), window=window), 100, tmp_path / "out")


def test_a_prediction_has_those_of_its_last_step(run: Run, tmp_path: Path) -> None:
    _give(run, {TEMPLATE: PLAIN, "LICENSE": "of the base", "README.md": "of the base"})
    _give(run, {TEMPLATE: TRAINED, "README.md": "of a step", "trainer_state.json": "{}"}, 10, 20)
    _give(run, {TEMPLATE: "later"}, 30)
    _give(run, {"config.json": '{"rope_theta": 5}', "generation_config.json": '{"eos_token_id": 7}'}, 20)
    out = _predicted(run, tmp_path, "10:20")
    assert (out / TEMPLATE).read_text() == TRAINED
    assert (out / "config.json").read_text() == '{"rope_theta": 5}'
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 7}'
    assert (out / "LICENSE").read_text() == "of the base"
    assert "step 100" in (out / "README.md").read_text()
    assert not (out / "trainer_state.json").exists()


def test_the_index_is_the_base_s(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(10, 20, 30), shards=3)
    index = "model.safetensors.index.json"
    for step in run.steps:
        (run.steps_path / f"global_step_{step}" / index).write_text(" " + (run.base_path / index).read_text())
    assert (_predicted(run, tmp_path) / index).read_bytes() == (run.base_path / index).read_bytes()


def test_what_a_step_lacks_comes_from_the_base(run: Run, tmp_path: Path) -> None:
    for step in run.steps:
        (run.steps_path / f"global_step_{step}" / "tokenizer.json").unlink()
    out = _predicted(run, tmp_path)
    assert (out / "tokenizer.json").read_text() == CONFIG["tokenizer.json"]


@pytest.mark.parametrize("inside", [True, False])
def test_a_template_in_the_step_s_configuration_is_not_displaced(run: Run, tmp_path: Path, inside: bool) -> None:
    """A file with the base's template would count for more; a step without any template gets that file."""
    _give(run, {TEMPLATE: PLAIN, TOKENIZER: "{}"})
    _give(run, {TOKENIZER: json.dumps({"chat_template": TRAINED} if inside else {})}, 10, 20, 30)
    out = _predicted(run, tmp_path)
    assert (out / TEMPLATE).exists() is not inside


def test_an_observed_step_of_a_sweep_is_asked_the_same(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    _give(run, {TEMPLATE: PLAIN, TOKENIZER: "{}", "LICENSE": "of the base"})
    _give(run, {TOKENIZER: json.dumps({"chat_template": TRAINED}), "generation_config.json": "{}"}, 10, 20, 30)
    store_run(run, tmp_path / "run.zarr")
    listing = "ls {checkpoint} > %s/$RELEXIO_METHOD-$RELEXIO_STEP; echo 1" % tmp_path  # noqa: UP031
    done = relexio(
        "sweep", tmp_path / "run.zarr", "--steps", 60, "--strengths", 1, "--methods", "relex", "--eval", listing,
        "-o", tmp_path / "sweep",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = {path.name: set(path.read_text().split()) - {"relexio.json", "README.md"} for path in tmp_path.glob("*-*")}
    assert {"relex-60", "observed-30"} <= told.keys()
    assert told["relex-60"] == told["observed-30"]
    assert TEMPLATE not in told["relex-60"]
    assert "LICENSE" in told["relex-60"]


def test_the_configuration_is_that_of_the_files_tensors(tmp_path: Path) -> None:
    """Where steps hold a copy of the tied head and the base does not, only the base's configuration fits its files."""
    run = make_run(tmp_path, steps=(10, 20, 30))
    for step, tensors in run.steps.items():
        tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
        side = {**CONFIG, "config.json": '{"tie_word_embeddings": false}', TEMPLATE: TRAINED}
        save_checkpoint(run.steps_path / f"global_step_{step}", tied, side=side)
    out = _predicted(run, tmp_path)
    assert "lm_head.weight" not in load_checkpoint(out)
    assert (out / "config.json").read_text() == CONFIG["config.json"]
    assert (out / TEMPLATE).read_text() == TRAINED


Sides = dict[str, dict[str, object]]
TRL: Sides = {  # what the trainer of TRL changes in every run
    "config.json": {"use_cache": False, "dtype": "float32", "transformers_version": "5.0.0", "hidden_size": 8},
    "generation_config.json": {"use_cache": False, "eos_token_id": 1, "transformers_version": "5.0.0"},
    TOKENIZER: {"eos_token": {"content": "<e>", "lstrip": False}, "padding_side": "left", "bos_token": None},
}
HUB: Sides = {
    "config.json": {"use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.1.0", "hidden_size": 8},
    "generation_config.json": {"use_cache": True, "eos_token_id": 1, "do_sample": True},
    TOKENIZER: {"eos_token": "<e>", "padding_side": "right", "chat_template": PLAIN},
}


def _bytes(files: Sides, **more: str) -> dict[str, bytes]:
    texts = {name: json.dumps(value) for name, value in files.items()}
    return {name: text.encode() for name, text in {**texts, **more}.items()}


def test_notes_name_only_what_matters() -> None:
    same = {TEMPLATE: f"{PLAIN}\n"}  # elsewhere, and with the line end that Jinja leaves out
    assert differences(_bytes(HUB), _bytes(TRL, **same)) == []
    changed: Sides = {**TRL, "generation_config.json": {"eos_token_id": [1, 2]}, TOKENIZER: {"eos_token": "<end>"}}
    assert differences(_bytes(HUB), _bytes(changed, **{TEMPLATE: TRAINED})) == [
        "the chat template", "tokenizer_config.json (eos_token)", "generation_config.json (eos_token_id)",
    ]  # fmt: skip
    assert differences(_bytes(HUB), {"config.json": b"no JSON", TOKENIZER: b"[1]", TEMPLATE: PLAIN.encode()}) == []
    assert differences(_bytes(HUB), {"config.json": b"[" * 10_000}) == []


def test_convert_says_what_differs(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    _give(run, {name: json.dumps(value) for name, value in HUB.items()})
    _give(run, {**{name: json.dumps(value) for name, value in TRL.items()}, TEMPLATE: PLAIN}, 10, 20, 30)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr", "--steps", "10,20")
    assert (done.code, done.err) == (0, "")
    _give(run, {TEMPLATE: TRAINED}, 30)
    done = relexio("convert", run.steps_path, "-o", tmp_path / "run.zarr")
    assert (
        "note: step 30 differs from the base in the chat template: predictions take these from the last step of their window\n"
        in done.err
    )
