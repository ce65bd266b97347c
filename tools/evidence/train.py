"""Train a tiny language model on a verifiable task: a base by supervised training, then RL, every step saved.

usage: python tools/evidence/train.py base --task add --steps 1800 -o RUNS/add/base
       python tools/evidence/train.py grpo --task add --steps 400 --seed 1 --base RUNS/add/base -o RUNS/add/seed-1

`base` learns from demonstrations (tasks.py says which), and --stop ends that early. `grpo` goes on from it with TRL's
GRPOTrainer: fp32 master weights, AdamW without decay, a constant learning rate, no KL term. After each optimizer step it
writes OUT/global_step_N, the bf16 weights in Hugging Face layout, and at the end OUT/log.json: reward, gradient norm
and seconds of each step. One CPU thread. Needs torch, transformers, trl and datasets (pip install -e ".[rlvr]").
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from tasks import CHARACTERS, TASKS, Task, reward
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS = "<pad>", "<eos>"


def tokenizer() -> Any:
    """A token for each character of the tasks, padding on the left."""
    words = {word: i for i, word in enumerate((PAD, EOS, "<unk>", *CHARACTERS))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token="<unk>", padding_side="left", model_max_length=64
    )


def new_model(task: Task, hidden: int = 192, layers: int = 4) -> Any:
    """Random fp32 weights: Qwen2 with a tied head for ``add``, Llama with a head of its own for all other tasks."""
    tied = task.name == "add"
    config = (transformers.Qwen2Config if tied else transformers.LlamaConfig)(
        vocab_size=len(CHARACTERS) + 3, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2 if tied else 4, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save(model: Any, directory: Path, dtype: Any = torch.bfloat16) -> None:
    """Write the weights, rounded, with config and tokenizer."""
    copy = transformers.AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True  # the trainer has switched it off; without it generating costs twice as much
    copy.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def train_base(task: Task, model: Any, seed: int, steps: int, stop: int, rate: float = 1e-3, batch: int = 256) -> None:
    """Supervised training on demonstrations up to step ``stop``; the rate rises for 100 steps and falls to 0 at ``steps``."""
    words, stream = tokenizer(), task.demonstrations(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, min(100, steps // 2), steps)
    for step in range(1, stop + 1):
        pairs = list(itertools.islice(stream, batch))
        tokens = words([a + b + EOS for a, b in pairs], return_tensors="pt")["input_ids"]
        labels = tokens.clone()
        labels[:, : -task.length - 1] = -100  # only answers are learnt
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


class SaveEveryStep(transformers.TrainerCallback):  # type: ignore[misc]  # mypy does not look into transformers
    """Writes global_step_N after the Nth optimizer step, and keeps the time of each step, saving included."""

    def __init__(self, directory: Path, dtype: Any) -> None:
        self.directory, self.dtype, self._last = directory, dtype, time.perf_counter()
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        save(model, self.directory / f"global_step_{state.global_step}", self.dtype)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def train_grpo(
    task: Task, base: Path, out: Path, seed: int, steps: int, rate: float, dtype: Any = torch.bfloat16,
    prompts: int = 32, samples: int = 8, moments: Path | None = None,
) -> None:  # fmt: skip
    """GRPO from ``base``: each step ``prompts`` new problems, ``samples`` answers to each, and one optimizer step.

    With ``moments``, a file, the optimizer goes on from the state that is in it, if there is one, and leaves its own there.
    """
    problems = itertools.islice(task.training(1_000_000 + seed), steps * prompts)
    data = datasets.Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems])
    config = trl.GRPOConfig(
        output_dir=str(out), seed=seed, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant",
        weight_decay=0.0, beta=0.0, temperature=1.0, num_generations=samples, per_device_train_batch_size=prompts * samples,
        gradient_accumulation_steps=1, max_completion_length=task.length + 1, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    saver = SaveEveryStep(out, dtype)
    optimizer = None  # TRL's own, which is this one
    if moments is not None:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
        if moments.exists():
            optimizer.load_state_dict(torch.load(moments))
    trainer = trl.GRPOTrainer(
        model, reward, config, train_dataset=data, processing_class=tokenizer(), callbacks=[saver], optimizers=(optimizer, None)
    )  # fmt: skip
    trainer.train()
    if moments is not None:
        torch.save(trainer.optimizer.state_dict(), moments)
    kept = [entry for entry in trainer.state.log_history if "reward" in entry]
    log = [
        {"step": e["step"], "reward": e["reward"], "grad_norm": e["grad_norm"], "seconds": round(s, 3)}
        for e, s in zip(kept, saver.seconds, strict=True)
    ]
    settings = {"task": task.name, "seed": seed, "steps": steps, "rate": rate, "prompts": prompts, "samples": samples}
    (out / "log.json").write_text(json.dumps({**settings, "log": log}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("base", "grpo"))
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--base", type=Path, help="where grpo begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stop", type=int, help="end the training of a base at this step")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--fp32", action="store_true", help="save the steps of grpo in fp32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.set_seed(given.seed)
    task = TASKS[given.task]
    if given.kind == "base":
        model = new_model(task)
        train_base(task, model, given.seed, given.steps, given.stop or given.steps, given.rate or 1e-3)
        save(model, given.out)
    elif given.base is None:
        parser.error("grpo needs --base")
    else:
        dtype = torch.float32 if given.fp32 else torch.bfloat16
        train_grpo(task, given.base, given.out, given.seed, given.steps, given.rate or 3e-6, dtype)


if __name__ == "__main__":
    main()
