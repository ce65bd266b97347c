"""RecordCallback in the Trainers of transformers and TRL: the store is that of a conversion of the checkpoints saved beside it."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from relexio.errors import CheckpointError, ExistsError, RelexioError, RequestError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.storage.local import LocalStorage
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, prepare
from tests.support.steps import CPU
from tests.test_rlvr import ROOT, load  # noqa: F401  # a fixture

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
pytest.importorskip("accelerate", reason="the Trainer needs it: pip install -e '.[rlvr]'")
pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("default:::(?!relexio)"),  # theirs, not ours
]


def llama(tied: bool = False, **config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, tie_word_embeddings=tied, **config,
        )
    )  # fmt: skip


def save(model: Any, directory: Path) -> Path:
    """The model in bf16, unless its configuration says another type."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    return directory


class Saver(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Saves each step as a checkpoint in bf16; adapters merged by PEFT."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        whole = copy.deepcopy(model)
        save(
            whole.merge_and_unload() if hasattr(whole, "peft_config") else whole,
            self.directory / f"step-{state.global_step}",
        )


def trainer(model: Any, out: Path, callbacks: list[Any], steps: int = 3, **settings: Any) -> Any:
    data = [{"input_ids": [i % 7 + 3, 4, i % 5 + 8], "labels": [i % 7 + 3, 4, i % 5 + 8]} for i in range(64)]
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", **settings,
        }
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)


def converted(base: Path, steps: Path, out: Path) -> Store:
    return convert(prepare(Request(out, base, steps), CPU, silent), silent).store


def recorder(*given: Any, **settings: Any) -> Any:
    from relexio.integrations.transformers import RecordCallback

    return RecordCallback(*given, **settings)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "base")


@pytest.fixture
def model(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def grpo(train: ModuleType, task: Any, model: Any, out: Path, callbacks: list[Any], **settings: Any) -> Any:
    """A trainer of TRL for two steps."""
    import datasets
    import trl

    data = datasets.Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in task.held_out()[:16]])
    config = trl.GRPOConfig(
        output_dir=str(out), max_steps=2, learning_rate=1e-2, num_generations=4, per_device_train_batch_size=16,
        max_completion_length=3, use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip

    def odd(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 2) for text in completions]

    return trl.GRPOTrainer(
        model, odd, config, train_dataset=data, processing_class=train.tokenizer(), callbacks=callbacks, **settings
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "task", ["add", pytest.param("sort", marks=pytest.mark.slow)]
)  # a tied head, and one of its own
def test_grpo_is_recorded(load: Callable[[str], ModuleType], tmp_path: Path, task: str, lora: bool) -> None:  # noqa: F811
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[rlvr]'")
    settings = {}
    if lora:
        peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
        settings["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4)
    train, chosen = load("train"), load("tasks").TASKS[task]
    torch.manual_seed(0)
    base = tmp_path / "base"
    train.save(train.new_model(chosen, hidden=32, layers=1), base)
    callbacks = [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr")]
    run = grpo(train, chosen, str(base), tmp_path / "out", callbacks, **settings)
    run.train()
    assert next(run.model.parameters()).dtype == torch.float32  # TRL's default, over a base of bf16
    recorded = open_store(tmp_path / "run.zarr")
    assert recorded.contents == converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert len(set(recorded.contents.values())) == len(recorded.contents) == 2
    assert next(tensor.kind.name for tensor in recorded.tensors) == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "fsdp2", "fsdp1", "lora", "lora1"])
def test_a_sharded_model_is_recorded(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    run_sharded(kind, base, tmp_path)
    recorded = open_store(tmp_path / "run.zarr")
    assert recorded.contents == converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert len(set(recorded.contents.values())) == 3


@pytest.mark.slow
def test_no_rank_waits_for_a_recording_that_failed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    told = run_sharded("disk", base, tmp_path)
    assert (tmp_path / "ended-0").exists() and (tmp_path / "ended-1").exists()
    assert told.count("RECORDING HAS STOPPED") == 1 and "DOES NOT HAVE THE WHOLE RUN, it has steps up to 1" in told
    assert open_store(tmp_path / "run.zarr").steps == (1,)


@pytest.mark.slow
def test_every_rank_is_told_what_is_wrong(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    run_sharded("wrong", base, tmp_path)
    for rank in (0, 1):
        assert "name the model before RL: RecordCallback(" in (tmp_path / f"told-{rank}").read_text()


def run_sharded(kind: str, base: Path, out: Path) -> str:
    """Two processes; what they print to stderr."""
    if kind.startswith("lora"):
        pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
    pytest.importorskip("transformers.distributed", reason="needs transformers that can shard")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests/support/sharded.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), kind, str(base), str(out)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def wrapped(name: str) -> Any:
    """A model with adapters of PEFT that are not zero."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
    torch.manual_seed(0)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False}
    dtype, cast = torch.bfloat16, True
    model = llama()
    match name:
        case "fp32 over fp32":
            dtype = torch.float32
        case "bf16 over bf16":
            cast = False
        case "rslora, with a head":
            settings |= {"use_rslora": True, "modules_to_save": ["lm_head", "norm"]}
        case "embedding":
            settings |= {"target_modules": ["embed_tokens", "v_proj"]}
        case "biases":
            settings |= {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    return peft.get_peft_model(model.to(dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=cast)


@pytest.mark.parametrize(
    "name",
    [
        "fp32 over bf16",
        "fp32 over fp32",
        "bf16 over bf16",
        "rslora, with a head",
        "embedding",
        "biases",
        "two adapters",
    ],
)
def test_adapters_are_merged_as_peft_does(name: str) -> None:
    from relexio.integrations.weights import gathered, weights_of

    model = wrapped(name)
    if name == "two adapters":
        other = copy.deepcopy(model.peft_config["default"])
        other.target_modules = {"q_proj", "k_proj"}
        model.add_adapter("other", other)
        model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.01 * (number + 1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = {w.names: w.join(*parts).detach().clone() for w, parts in gathered(weights_of(model))}
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    merged = model.merge_and_unload().state_dict()
    assert {key for names in found for key in names} == set(merged)
    for names, tensor in found.items():
        assert all(tensor.dtype == merged[key].dtype and torch.equal(tensor, merged[key]) for key in names), names
    bases = [key for key in before if key.endswith(".base_layer.weight")]
    places = {key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key in bases}
    assert bases and not any(torch.equal(before[key], merged[places[key]]) for key in bases)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "q_proj: DoraLinearVariant is not recorded"),
        ({"trainable_token_indices": [1, 2]}, "TrainableTokens"),
        ({"modules_to_save": ["embed_tokens"], "tied": True}, "is tied to lm_head.weight"),
        ({"target_modules": ["embed_tokens"], "tied": True}, "is tied to lm_head.weight"),
        ({"target_modules": ["q_proj"], "kind": "IA3Config", "feedforward_modules": []}, "type IA3 is not recorded"),
        ({"kind": "PrefixTuningConfig", "num_virtual_tokens": 2}, "type PREFIX_TUNING is not recorded"),
        ({"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}, "lora_bias is not recorded"),
    ],
)
def test_other_adapters_are_refused_before_training(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
    given = {"task_type": "CAUSAL_LM", **settings}
    kind, tied = given.pop("kind", "LoraConfig"), given.pop("tied", False)
    inner = llama(tied)
    if "c_attn" in given.get("target_modules", ()):
        inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    elif kind == "LoraConfig":
        given.setdefault("target_modules", ["q_proj"])
    model = peft.get_peft_model(inner, getattr(peft, kind)(**given))
    run = trainer(model, tmp_path / "out", [recorder(tmp_path / "run.zarr", base=save(inner, tmp_path / "base"))])
    with pytest.raises(CheckpointError, match=told):
        run.train()
    assert run.state.global_step == 0 and not (tmp_path / "run.zarr").exists()


def test_a_run_that_is_resumed(tmp_path: Path, base: Path, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(
        copy.deepcopy(model), out, [Saver(tmp_path / "first"), recorder(tmp_path / "run.zarr")], 4, **saving
    ).train()
    first = open_store(tmp_path / "run.zarr").contents
    assert first == converted(base, tmp_path / "first", tmp_path / "files.zarr").contents
    with pytest.raises(RequestError, match=r"has steps up to 4 of an earlier run.*resume training from a checkpoint"):
        trainer(copy.deepcopy(model), out, [recorder(tmp_path / "run.zarr")]).train()
    resumed = trainer(model, again, [Saver(tmp_path / "second"), recorder(tmp_path / "run.zarr")], 5, seed=7)
    with caplog.at_level(logging.WARNING, "relexio"):
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "step 3 replaces steps 3:4" in caplog.text or "step 3 replaces steps 3, 4" in caplog.text
    contents = open_store(tmp_path / "run.zarr").contents
    second = converted(base, tmp_path / "second", tmp_path / "second.zarr").contents
    assert contents == {1: first[1], 2: first[2], **second} and sorted(second) == [3, 4, 5]
    assert contents[4] != first[4]


def test_training_that_is_interrupted_goes_on_with_the_same_callback(tmp_path: Path, base: Path, model: Any) -> None:
    class Interrupt(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    callbacks = [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr"), Interrupt()]
    run = trainer(model, tmp_path / "out", callbacks, 4, save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    recorded = open_store(tmp_path / "run.zarr")
    assert recorded.contents == converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert recorded.steps == (1, 2, 3, 4)


class Full(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """The disk is full from a step on."""

    def __init__(self, step: int, patch: pytest.MonkeyPatch) -> None:
        self.step, self.patch = step, patch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        def full(*given: Any) -> None:
            raise OSError(28, "No space left on device", "run.zarr")

        if state.global_step + 1 == self.step:
            self.patch.setattr(LocalStorage, "put", full)


@pytest.mark.parametrize("step", [1, 3, 6])  # the last one fails when the recorder is closed, or when it stores step 5
def test_training_goes_on_when_recording_fails(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    callback = recorder(tmp_path / "run.zarr")
    run = trainer(model, tmp_path / "out", [callback, Full(step, monkeypatch)], 6)
    with caplog.at_level(logging.ERROR, "relexio"):
        run.train()
    assert run.state.global_step == 6
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2 or (step == 6 and len(told) == 1)
    words = ["RECORDING HAS STOPPED", "DOES NOT HAVE THE WHOLE RUN"][-len(told) :]
    assert all(word in text and "No space left" in text for word, text in zip(words, told, strict=True))


def test_every_second_step_and_the_last(tmp_path: Path, base: Path, model: Any) -> None:
    trainer(model, tmp_path / "out", [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr", every=2)], 5).train()
    recorded = open_store(tmp_path / "run.zarr")
    saved = converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert recorded.contents == {step: saved[step] for step in (2, 4, 5)}
    with pytest.raises(RequestError, match="every=0"):
        recorder(tmp_path / "run.zarr", every=0)


def test_the_last_step_is_not_the_best_model(tmp_path: Path, base: Path, model: Any) -> None:
    """The Trainer loads its best model before on_train_end."""
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    steps: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    callbacks = [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr", every=10)]
    run = trainer(model, tmp_path / "out", callbacks, **best, **steps)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert open_store(tmp_path / "run.zarr").contents == {3: saved[3]}


@pytest.fixture
def stop() -> Iterator[Any]:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    yield Stop()


def test_a_run_that_ends_early(tmp_path: Path, base: Path, model: Any, stop: Any) -> None:
    """What stops it is known after the step only."""
    callbacks = [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr", every=100), stop]
    run = trainer(model, tmp_path / "out", callbacks, -1, num_train_epochs=2, per_device_train_batch_size=16)
    run.train()
    assert open_store(tmp_path / "run.zarr").steps == (4,) == (run.state.global_step,)
    saved = converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert open_store(tmp_path / "run.zarr").contents == {4: saved[4]}


def test_what_is_wrong_is_told_before_training(tmp_path: Path, base: Path, model: Any) -> None:
    def told(kind: type[RelexioError], text: str, model: Any, *given: Any) -> None:
        run = trainer(model, tmp_path / "out", [recorder(*given)])
        with pytest.raises(kind, match=text):
            run.train()
        assert run.state.global_step == 0

    other = save(llama(num_key_value_heads=1), tmp_path / "other")
    told(CheckpointError, r"the model: tensor .*k_proj.weight: shape \[16, 16\], in base .*/other \[8, 16\]", model,
         tmp_path / "run.zarr", other)  # fmt: skip
    deeper = save(llama(attention_bias=True), tmp_path / "deeper")
    told(CheckpointError, "the model: lacks tensors of .*bias", model, tmp_path / "run.zarr", deeper)
    told(RequestError, 'does not say what it was loaded from: .*base="path', llama(), tmp_path / "run.zarr")
    (tmp_path / "folder").mkdir()
    told(ExistsError, "not a trajectory", model, tmp_path / "folder")
    assert not (tmp_path / "run.zarr").exists()


def test_the_base_is_found_in_the_cache_of_the_hub(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / f"hub/models--someone--tiny/snapshots/{commit}"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (tmp_path / "hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = transformers.AutoModelForCausalLM.from_pretrained("someone/tiny", local_files_only=True)
    trainer(model, tmp_path / "out", [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr")]).train()
    found = open_store(tmp_path / "run.zarr")
    assert found.contents == converted(snapshot, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert found.base().source == str(snapshot)
    model.config._name_or_path = "someone/else"
    run = trainer(model, tmp_path / "out", [recorder(tmp_path / "other.zarr")])
    with pytest.raises(RequestError, match="someone/else is no directory, and not in the Hub's cache"):
        run.train()


def test_experts_are_recorded_as_their_files_have_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    base = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer(model, tmp_path / "out", [Saver(tmp_path / "steps"), recorder(tmp_path / "run.zarr")], 2).train()
    recorded = open_store(tmp_path / "run.zarr")
    assert recorded.contents == converted(base, tmp_path / "steps", tmp_path / "files.zarr").contents
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in recorded.table


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "relexio.integrations.transformers", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'relexio\[hf\]'"):
        recorder("run.zarr")
