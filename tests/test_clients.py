"""Programs that people use predictions with, really run: lm-evaluation-harness in a sweep, mergekit, transformers.

They need packages that nothing else needs: pip install -e ".[test,hf,clients]", then make clients.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relexio.verbs.demo.accuracy import accuracy
from relexio.verbs.demo.data import Run, unpack
from tests.support.command import Relexio
from tests.support.make import BF16, load_checkpoint, rounded

pytest.importorskip("torch", reason="needs torch: pip install -e '.[hf]'")
pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.filterwarnings("default")]  # theirs, not ours

TASK = """
task: additions
dataset_path: json
dataset_kwargs: {data_files: {test: PROBLEMS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
MERGE = """
merge_method: linear
dtype: bfloat16
models:
  - {model: OBSERVED, parameters: {weight: 0.5}}
  - {model: PREDICTED, parameters: {weight: 0.5}}
"""


@pytest.fixture
def demo(tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The demo's run; ``run.zarr`` has its first 50 steps, and ``predicted`` is step 200."""
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run, store = unpack(tmp_path / "demo"), tmp_path / "run.zarr"
    for command in (
        ("convert", run.checkpoints, "--base", run.base, "--steps", "5:50", "-o", store),
        ("predict", store, "--step", 200, "-o", tmp_path / "predicted"),
    ):
        assert relexio(*command).code == 0
    return run


def script() -> str:
    """The evaluation of docs/sweep.md with the harness's command line, for a small task on the CPU."""
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text()
    (text,) = re.findall(r"```sh\n(set -e\n.*?lm_eval.*?)```", page, re.DOTALL)
    for theirs, ours in (
        ("gsm8k --num_fewshot 5 --limit 200", "additions --include_path $(dirname $0)"),
        ("--device cuda:0 --batch_size auto", "--device cpu --batch_size 64"),
        ("dtype=auto", "dtype=float32"),  # as the demo computes; what bf16 gives depends on the processor
    ):
        assert theirs in text
        text = text.replace(theirs, ours)
    return str(text)


def test_a_sweep_with_lm_evaluation_harness(demo: Run, tmp_path: Path, relexio: Relexio) -> None:
    """Its scores are those of the demo's own evaluation."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[clients]'")
    problems, folder = demo.problems[:64], tmp_path / "eval"
    folder.mkdir()
    lines = (json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in problems)
    (folder / "problems.jsonl").write_text("\n".join(lines))
    (folder / "additions.yaml").write_text(TASK.replace("PROBLEMS", str(folder / "problems.jsonl")))
    (folder / "eval_hf.sh").write_text(script())
    done = relexio(
        "sweep", tmp_path / "run.zarr", "--window", "5:50", "--steps", "200", "--methods", "relex", "--strengths", "1",
        "--eval", f"sh {folder / 'eval_hf.sh'} {{checkpoint}}", "--metric", "results.additions.exact_match,none",
        "-o", tmp_path / "sweep", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())["results"]
    expected = {0: demo.base, 50: demo.step(50), 200: tmp_path / "predicted"}
    assert {row["step"]: row["score"] for row in rows} == {
        step: accuracy(path, problems) for step, path in expected.items()
    }


def test_mergekit_takes_the_mean_of_an_observed_and_a_predicted_checkpoint(demo: Run, tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="needs mergekit: pip install -e '.[clients]'")
    import torch
    import transformers

    observed, predicted, out = demo.step(50), tmp_path / "predicted", tmp_path / "merged"
    config = MERGE.replace("OBSERVED", str(observed)).replace("PREDICTED", str(predicted))
    (tmp_path / "merge.yaml").write_text(config)
    command = ["mergekit-yaml", str(tmp_path / "merge.yaml"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other, merged = (load_checkpoint(path) for path in (observed, predicted, out))
    assert merged.keys() == one.keys() == other.keys()
    for name, found in merged.items():
        mean = (one[name].astype(np.float64) + other[name].astype(np.float64)) / 2
        assert found.dtype == BF16 and (found == rounded(mean, BF16)).all(), name
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and accuracy(out, demo.problems[:64]) > 0


def test_a_pipeline_of_transformers_answers(demo: Run, tmp_path: Path) -> None:
    import transformers

    problems = demo.problems[:64]
    answer = transformers.pipeline("text-generation", model=str(tmp_path / "predicted"), device="cpu", batch_size=64)
    found = answer([prompt for prompt, _ in problems], max_new_tokens=5, do_sample=False, return_full_text=False)
    texts = [one["generated_text"].strip() for (one,) in found]
    right = sum(text == wanted for text, (_, wanted) in zip(texts, problems, strict=True)) / len(problems)
    assert right == accuracy(tmp_path / "predicted", problems) > accuracy(demo.base, problems)
