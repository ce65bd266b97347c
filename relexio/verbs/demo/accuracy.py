"""Task accuracy of a demo checkpoint: exact answers, greedy."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.engine.process import cores
from relexio.verbs.demo.model import Model, load, logits

_AT_ONCE = 125  # problems: their activations stay in a processor's cache


def accuracy(checkpoint: Path, problems: list[tuple[str, str]]) -> float:
    """The share of problems (prompt, answer) that a checkpoint answers exactly, and then ends; computed in float32.

    Raises CheckpointError for a model of another kind than the demo's.
    """
    model = load(checkpoint)
    parts = [problems[first : first + _AT_ONCE] for first in range(0, len(problems), _AT_ONCE)]
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        return sum(pool.map(lambda part: _right(model, part), parts)) / len(problems)


def _right(model: Model, problems: list[tuple[str, str]]) -> int:
    """How many answers are those of greedy decoding.

    They are if each token is the likeliest after the prompt and the tokens before it. So one pass over prompt and answer
    tells, and nothing has to be decoded.
    """
    longest = max(len(prompt + answer) for prompt, answer in problems)
    tokens = np.full((len(problems), longest + 1), model.end)
    asked = np.zeros((len(problems), longest), bool)
    for row, (prompt, answer) in enumerate(problems):
        text = [model.vocabulary[character] for character in prompt + answer]
        tokens[row, : len(text)] = text
        asked[row, len(prompt) - 1 : len(text)] = True
    likeliest = logits(model, tokens[:, :-1]).argmax(axis=-1)
    return int(((likeliest == tokens[:, 1:]) | ~asked).all(axis=1).sum())
