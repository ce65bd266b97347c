"""What trainers call the directories of their steps, where in these the model is, and what says that a step is whole."""

import re
from pathlib import Path
from typing import NamedTuple

from relexio.errors import RequestError


class Trainer(NamedTuple):
    """A trainer: a pattern of names of step directories, the model's directory inside, and its marker of a whole step.

    ``marker`` is a file that is written into the step behind its weights; ``beside`` one beside the steps, which has the
    number of the last whole one. ``added`` goes to the number in the name.
    """

    name: str
    directory: str
    inside: str = ""
    marker: str = ""
    beside: str = ""
    added: int = 0


#: docs/trainers.md has this table for people (a test compares). The first that fits a directory is what it is called.
TRAINERS = (
    Trainer("TRL, Trainer", r"checkpoint-(\d+)", marker="trainer_state.json"),
    Trainer("verl, FSDP", r"global_step_(\d+)", "actor/huggingface", beside="latest_checkpointed_iteration.txt"),
    Trainer("verl, Megatron", r"global_step_(\d+)", "actor/model/huggingface", marker="actor/ckpt_contents.json"),
    Trainer("SkyRL", r"global_step_(\d+)", "policy", beside="latest_ckpt_global_step.txt"),
    Trainer("OpenRLHF", r"global_step(?!_\d+$)_?(\d+)(?:_hf)?"),
    Trainer("NeMo-RL", r"step_(\d+)", "policy/weights/model/consolidated"),
    Trainer("prime-rl, open-instruct", r"step_(\d+)", marker="STABLE"),
    Trainer("torchtitan", r"step-(\d+)"),
    Trainer("slime, miles", r"weight_v(\d+)"),
    Trainer("Megatron-LM, slime", r"iter_(\d+)", "huggingface"),
    Trainer("SkyRL, deltas", r"delta-(\d+)"),
    Trainer("AReaL", r"epoch\d+epochstep\d+globalstep(\d+)", added=1),
    Trainer("ROLL", r"checkpoint-(\d+)", "actor_train"),
)
#: Other places of a model in a step. An adapter comes before the shards beside it, which hold base and adapter apart.
_OTHERS = (
    "huggingface", "hf_model", "lora_adapter", "actor/lora_adapter", "policy/lora_adapter", "actor", "policy/huggingface",
    "policy/weights/model", "sharded",
)  # fmt: skip
INSIDE = tuple(dict.fromkeys([trainer.inside for trainer in TRAINERS] + [*_OTHERS]))
MARKERS = tuple(trainer.marker for trainer in TRAINERS if trainer.marker)
BESIDE = tuple(trainer.beside for trainer in TRAINERS if trainer.beside)
_DIGITS = 15


def parse_pattern(text: str) -> re.Pattern[str]:
    """Parse a pattern of names of step directories, such as ``iter_(\\d+)_hf``. Raises RequestError if it gives no number."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise RequestError(f"{text!r} is no pattern: {error}; write one like 'iter_(\\d+)_hf'") from error
    if pattern.groups != 1:
        raise RequestError(f"{text!r}: a pattern has one group, which gives the step, like 'iter_(\\d+)_hf'")
    return pattern


def step_of(name: str, pattern: re.Pattern[str] | None = None) -> int | None:
    """The step that the name of a directory tells, by the ``pattern`` if there is one; None if it tells none."""
    known = (
        [(re.compile(trainer.directory), trainer.added) for trainer in TRAINERS] if pattern is None else [(pattern, 0)]
    )
    for names, added in known:
        found = names.fullmatch(name)
        if found and found[1] and found[1].isascii() and found[1].isdigit() and len(found[1]) <= _DIGITS:
            return int(found[1]) + added
    return None


def trainer_of(directory: Path, model: Path) -> str | None:
    """Who writes models in such a place of a step's directory; None if the names do not tell."""
    inside = model.relative_to(directory).as_posix().removeprefix(".")
    for trainer in TRAINERS:
        if re.fullmatch(trainer.directory, directory.name) and trainer.inside == inside:
            return trainer.name
    return None
