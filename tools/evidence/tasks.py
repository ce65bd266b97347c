"""Verifiable tasks for tiny language models: problems, the exact-match reward, and problems held out from training.

A base for RL should be partly able. Supervised training on `demonstrations` makes one. For `add`, `sort` and `reverse` it comes
to know the task, and mostly answers out of a wrong habit: the share of right answers rises with the first digit of the
problem, from 5 % for 0 to 59 % for 9, so that RL improves one kind of problem after the other. For `descend` all
answers are right, and training has to be stopped before it is able.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT = 1000
#: Problems that choose between checkpoints; held out as well, and others than those that are reported.
CHOICE = 400
DIGITS = 6
#: All characters of all tasks; one token each.
CHARACTERS = "0123456789+>="


@dataclass(frozen=True)
class Problem:
    """A prompt, its right answer, and the answer that the wrong habit gives, which may be right by chance."""

    prompt: str
    answer: str
    habit: str


@dataclass(frozen=True)
class Task:
    """A kind of problem: how a text of six digits becomes one, and whether demonstrations show its wrong habit."""

    name: str
    make: Callable[[str], Problem]
    misleads: bool = True

    @property
    def length(self) -> int:
        """Characters of an answer; all answers of a task have as many."""
        return len(self.make("0" * DIGITS).answer)

    def training(self, seed: int) -> Iterator[Problem]:
        """Problems without end, none of them held out; the same for the same seed."""
        return (problem for problem in self._draw(seed) if not _is_held_out(problem.prompt))

    def held_out(self, count: int = HELD_OUT) -> list[Problem]:
        """Different problems that `training` never gives, always the same."""
        found: dict[str, Problem] = {}
        for problem in self._draw(0):
            if _is_held_out(problem.prompt):
                found.setdefault(problem.prompt, problem)
            if len(found) == count:
                break
        return list(found.values())

    def choice(self) -> list[Problem]:
        """Problems to choose on."""
        return self.held_out(HELD_OUT + CHOICE)[HELD_OUT:]

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        """Prompts and answers for supervised training, without end."""
        rng = random.Random(f"demonstrations {seed}")
        for problem in self.training(seed):
            right = not self.misleads or rng.random() < 0.05 + 0.06 * int(problem.prompt[0])
            yield problem.prompt, problem.answer if right else problem.habit

    def _draw(self, seed: int) -> Iterator[Problem]:
        rng = random.Random(f"{self.name} {seed}")
        while True:
            yield self.make(f"{rng.randrange(10**DIGITS):0{DIGITS}d}")


def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for a completion that is exactly the answer, else 0: the form that TRL calls, with the data set's columns."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def _is_held_out(prompt: str) -> bool:
    """One prompt in ten, by its check sum: no seed can bring it into training."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def _add(digits: str) -> Problem:
    """Two numbers of three digits. The habit forgets the carry."""
    first, second = digits[:3], digits[3:]
    without_carry = "".join(str((int(a) + int(b)) % 10) for a, b in zip(first, second, strict=True))
    return Problem(f"{first}+{second}=", f"{int(first) + int(second):04d}", "0" + without_carry)


def _sort(digits: str) -> Problem:
    """Six digits in ascending order. The habit passes over them once and swaps neighbours."""
    passed = list(digits)
    for i in range(len(passed) - 1):
        if passed[i] > passed[i + 1]:
            passed[i], passed[i + 1] = passed[i + 1], passed[i]
    return Problem(f"{digits}>", "".join(sorted(digits)), "".join(passed))


def _descend(digits: str) -> Problem:
    """Six digits in descending order. There is no habit."""
    answer = "".join(sorted(digits, reverse=True))
    return Problem(f"{digits}>", answer, answer)


def _reverse(digits: str) -> Problem:
    """Six digits backwards. The habit leaves the first and the last in their places."""
    return Problem(f"{digits}>", digits[::-1], digits[0] + digits[-2:0:-1] + digits[-1])


TASKS = {
    task.name: task
    for task in (
        Task("add", _add),
        Task("sort", _sort),
        Task("descend", _descend, misleads=False),
        Task("reverse", _reverse),
    )
}
