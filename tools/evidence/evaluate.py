"""Greedy accuracy of checkpoints on the held-out problems of a task, exact match.

usage: python tools/evidence/evaluate.py --task add [--choice] CHECKPOINT...

With --choice on 400 others, for what chooses. A line for each checkpoint, and on the last line the last one's accuracy alone,
so that this is also a command that evaluates one checkpoint. One CPU thread. Needs torch and transformers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import TASKS, Problem, Task, reward


def accuracy(checkpoint: Path, task: Task, problems: list[Problem] | None = None) -> float:
    """The share of problems (those held out) that a checkpoint answers exactly: greedy, its weights computed with in fp32."""
    problems = problems or task.held_out()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return sum(rewards(model, tokenizer, problems, task.length)) / len(problems)


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
    parser.add_argument("--choice", action="store_true", help="the problems that choose between checkpoints")
    given = parser.parse_args()
    task = TASKS[given.task]
    problems = task.choice() if given.choice else task.held_out()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for checkpoint in given.checkpoints:
        found = accuracy(checkpoint, task, problems)
        print(f"{checkpoint}: {found:.3f}")
    print(found)


if __name__ == "__main__":
    main()
