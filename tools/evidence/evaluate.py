"""Greedy accuracy of checkpoints on the held-out problems of a task, exact match.

usage: python tools/evidence/evaluate.py --task add CHECKPOINT...

A line for each checkpoint, and on the last line the last one's accuracy alone, so that this is also a command that
evaluates one checkpoint. One CPU thread. Needs torch and transformers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import HELD_OUT, TASKS, Problem, Task, reward


def accuracy(checkpoint: Path, task: Task, count: int = HELD_OUT) -> float:
    """The share of held-out problems that a checkpoint answers exactly: greedy, its weights computed with in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return sum(rewards(model, tokenizer, task.held_out(count), task.length)) / count


def rewards(model: Any, tokenizer: Any, problems: list[Problem], length: int) -> list[float]:
    """The reward of the greedy answer to each problem; prompts must be of one length."""
    tokens = tokenizer([p.prompt for p in problems], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length + 1, do_sample=False
        )
    texts = tokenizer.batch_decode(found[:, tokens.shape[1] :], skip_special_tokens=True)
    return reward(texts, [p.answer for p in problems])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--task", choices=TASKS, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for checkpoint in given.checkpoints:
        found = accuracy(checkpoint, TASKS[given.task])
        print(f"{checkpoint}: {found:.3f}")
    print(found)


if __name__ == "__main__":
    main()
