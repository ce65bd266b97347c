"""Predicted checkpoints load in transformers unchanged, and the demo's model in NumPy computes what transformers does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from relexio.verbs.demo.accuracy import accuracy
from relexio.verbs.demo.data import Run as Demo
from relexio.verbs.demo.data import unpack
from relexio.verbs.demo.model import Model, load, logits
from tests.support.make import Run
from tests.support.steps import fit_run, predict_run, store_run

pytest.importorskip("torch", reason="needs torch: pip install -e '.[hf]'")
pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("default"),  # theirs, not ours
]


def train(root: Path, tied: bool, dtype: str, shard: str) -> Run:
    """Checkpoints that transformers itself saves, of a tiny model that moves along a line."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    words = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1")
    pull = {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()}
    paths = {}
    for step in (0, 10, 20, 30):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += pull[name] * (10 if step else 0)
        paths[step] = root / ("base" if step == 0 else f"steps/checkpoint-{step}")
        model.save_pretrained(paths[step], max_shard_size=shard)
        tokenizer.save_pretrained(paths[step])
    run = Run.__new__(Run)
    run.base_path, run.steps_path = paths[0], root / "steps"
    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tied", "shard"), [(True, "1GB"), (False, "20KB")])
def test_a_prediction_loads(tmp_path: Path, tied: bool, dtype: str, shard: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(tmp_path, tied, dtype, shard)
    out = predict_run(fit_run(store_run(run, tmp_path / "run.zarr")), 60, tmp_path / "out")
    assert sorted(p.name for p in out.glob("*.safetensors*")) == sorted(
        p.name for p in run.base_path.glob("*.safetensors*")
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    last = AutoModelForCausalLM.from_pretrained(run.steps_path / "checkpoint-30", dtype="auto")
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), last.parameters(), strict=True)]
    assert max(moved) > 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("5 7")["input_ids"] == [5, 7]
    assert model(torch.tensor([[5, 7]])).logits.isfinite().all()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return unpack(tmp_path_factory.mktemp("demo") / "run")


def theirs(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module", params=["the demo's base", "another"])
def pair(request: pytest.FixtureRequest, demo: Demo) -> tuple[Any, Model]:
    """A model in transformers and in NumPy: the demo's base, or one with random weights and three queries to a key."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if request.param != "another":
        return theirs(demo.base), load(demo.base)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=27, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        weights = {name: parameter.normal_(0, 0.3).numpy() for name, parameter in model.named_parameters()}
    return model, Model(weights, {}, 1, 2, 6, 2, 1e-2, 10000.0)


@settings(max_examples=30)
@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=st.integers(0, 26)))
def test_the_demo_computes_what_transformers_does(pair: tuple[Any, Model], tokens: np.ndarray) -> None:
    import torch

    with torch.inference_mode():
        expected = pair[0](torch.from_numpy(tokens)).logits.numpy()
    found = logits(pair[1], tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)  # of values up to about 25


@pytest.mark.parametrize("step", [0, 50, 200])
def test_the_demo_counts_the_answers_that_transformers_gives(demo: Demo, step: int) -> None:
    """Decoded there one token after the other."""
    import torch
    from transformers import AutoTokenizer

    checkpoint, problems = demo.step(step) if step else demo.base, demo.problems[:400]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = tokenizer([prompt for prompt, _ in problems], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ids = theirs(checkpoint).generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, do_sample=False
        )
    answers = tokenizer.batch_decode(ids[:, prompts.shape[1] :])
    right = sum(text == f"{answer}<eos>" for text, (_, answer) in zip(answers, problems, strict=True))
    # One of them may be a tie, which another library of linear algebra decides otherwise.
    assert abs(accuracy(checkpoint, problems) * len(problems) - right) < 1.5
