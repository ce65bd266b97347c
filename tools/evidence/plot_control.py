"""Tables and figure of what control.py has measured.

usage: python tools/evidence/plot_control.py RESULTS/*.json [--json docs/control.json] [--plot docs/control.png]

One FILE may be an earlier --json. Needs matplotlib.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

Runs = list[dict[str, Any]]
SHOWN = (10, 20, 30, 60)
#: What is compared under "How to leap", and after how many steps: those at which segments of every length end.
HOW = ("leap", "leap-5", "leap-20", "pinned", "secant", "moments", "restart")
ENDS = (20, 40, 60)
#: After so many steps with leaps plain training of the same CPU time is not over.
TIMED = (10, 20)
COLOURS = {10: "#9ecae1", 20: "#5aa0d0", 30: "#2a6fbb", 60: "#12325c"}


def load(files: list[Path]) -> Runs:
    """All runs that have ended."""
    found: Runs = []
    for file in files:
        if text := file.read_text().strip():
            value = json.loads(text)
            found += value if isinstance(value, list) else [value]
    return sorted(found, key=lambda run: (run["task"], float(run["rate"]), run["kind"], run["seed"]))


def chosen(runs: Runs, **wanted: object) -> Runs:
    """Those with these facts."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def values(runs: Runs, trained: int, what: str = "accuracy", **more: object) -> list[float]:
    """A figure of each run at a point: after so many steps, of no other kind unless it is named."""
    wanted = {"kind": None, **more, "trained": trained}
    return [p[what] for run in runs for p in run["points"] if all(p.get(k) == v for k, v in wanted.items())]


def spent(run: dict[str, Any], point: dict[str, Any]) -> float:
    """CPU seconds of training and choosing up to a point; each segment counts as much as the first.

    docs/control.json is of runs whose later segments began with models that say ``use_cache: false``, and took longer for the same
    work. So did choosing, which is counted as it was.
    """
    if run["kind"] == "plain":
        return float(point["train"])
    first = next(p["train"] for p in run["points"] if p["trained"] == run["segment"])
    return float(first * point["trained"] / run["segment"] + point["choose"])


def in_that_time(plain: Runs, leaps: Runs, trained: int) -> list[float]:
    """What plain training has (between its points: on a line) in the CPU time of so many steps with leaps, seed by seed."""
    found = []
    for run in leaps:
        for other in chosen(plain, seed=run["seed"]):
            (point,) = (p for p in run["points"] if p["trained"] == trained)
            points = [p for p in other["points"] if "kind" not in p]
            seconds, shares = ([p[what] for p in points] for what in ("train", "accuracy"))
            found.append(float(np.interp(spent(run, point), seconds, shares)))
    return found


def cell(found: list[float]) -> str:
    """The mean in percent, and the least and the most of several."""
    if not found:
        return "-"
    spread = f" ({100 * min(found):.0f}-{100 * max(found):.0f})" if len(found) > 1 else ""
    return f"{100 * mean(found):.1f}{spread}"


def names(runs: Runs) -> tuple[list[str], list[str]]:
    """Tasks and rates, in order."""
    return sorted({run["task"] for run in runs}), sorted({run["rate"] for run in runs}, key=float)


def tables(runs: Runs) -> None:
    """Print them as Markdown."""
    tasks, rates = names(runs)
    heads = [f"plain, {n} | leaps, {n}{' | plain, in that time' * (n in TIMED)}" for n in SHOWN]
    print(f"| task | rate | seeds | {' | '.join(heads)} | CPU time, leaps / plain |")
    print("|---|---|---|" + "---|" * (2 * len(SHOWN) + len(TIMED) + 1))
    for task in tasks:
        for rate in rates:
            plain, leaps = (chosen(runs, task=task, rate=rate, kind=kind) for kind in ("plain", "leap"))
            if not plain:
                continue
            cells = []
            for n in SHOWN:
                cells += [cell(values(plain, n)), cell(values(leaps, n))]
                cells += [cell(in_that_time(plain, leaps, n))] if n in TIMED else []
            both = [[spent(run, run["points"][-1]) for run in some] for some in (plain, leaps)]
            times = f"{mean(both[1]) / mean(both[0]):.1f}" if all(both) else "-"
            print(f"| {task} | {rate} | {len(plain)}, {len(leaps)} | {' | '.join(cells)} | {times} |")
    ends = "20 steps | 60 steps | mean of the last 10 | restarts"
    kinds = [("relex", 18), ("relex", 27), ("relex", 60), ("pinned", 18), ("pinned", 27), ("pinned", 60)]
    print(f"\n| task | rate | 10 steps | {' | '.join(f'{kind} to {n}' for kind, n in kinds)} | {ends} |")
    print("|---|---|---|" + "---|" * (len(kinds) + 4))
    for task in tasks:
        for rate in rates:
            plain, restarts = (chosen(runs, task=task, rate=rate, kind=kind) for kind in ("plain", "restart"))
            if not plain:
                continue
            cells = [cell(values(plain, 10))]
            cells += [cell(values(plain, 9, kind=kind, step=step)) for kind, step in kinds]
            cells += [cell(values(plain, n)) for n in (20, 60)]
            cells += [cell(values(plain, 60, kind="mean of the last 10")), cell(values(restarts, 60))]
            print(f"| {task} | {rate} | {' | '.join(cells)} |")


def how_table(runs: Runs) -> None:
    """Print what the choices of a leap are worth, where all of them were tried: seed by seed, for it is one."""
    tasks, rates = names(runs)
    print(f"\n| task | rate | steps | plain | {' | '.join(HOW)} |")
    print("|---|---|---|---|" + "---|" * len(HOW))
    for task in tasks:
        for rate in rates:
            seeds = {run["seed"] for run in chosen(runs, task=task, rate=rate, kind="leap-20")}
            found = {
                kind: [run for run in chosen(runs, task=task, rate=rate, kind=kind) if run["seed"] in seeds]
                for kind in ("plain", *HOW)
            }
            if not seeds:
                continue
            for n in ENDS:
                print(f"| {task} | {rate} | {n} | {' | '.join(cell(values(some, n)) for some in found.values())} |")
            times = [[spent(run, run["points"][-1]) for run in some] for some in found.values()]
            print(f"| {task} | {rate} | CPU s | {' | '.join(f'{mean(some):.0f}' if some else '-' for some in times)} |")


def plot(runs: Runs, out: str) -> None:
    """Accuracy against the rate after some numbers of steps; and against CPU time, at a cautious and at the best rate."""
    import matplotlib.pyplot as plt

    tasks, rates = names(runs)
    tasks = [task for task in tasks if len({run["rate"] for run in chosen(runs, task=task, kind="leap")}) == len(rates)]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(
        2, len(tasks), figsize=(3.4 * len(tasks), 6), layout="constrained", squeeze=False, sharey="col"
    )
    for task, upper, lower in zip(tasks, panels[0], panels[1], strict=True):
        for n in SHOWN:
            for kind, style in (("plain", "-o"), ("leap", "--^")):
                found = [(float(r), values(chosen(runs, task=task, rate=r, kind=kind), n)) for r in rates]
                points = [(rate, 100 * mean(some)) for rate, some in found if some]
                upper.plot(
                    *zip(*points, strict=True),
                    style,
                    color=COLOURS[n],
                    ms=4,
                    label=f"{n} steps, {'with leaps' if kind == 'leap' else 'plain'}",
                )
        upper.set(xscale="log", title=task, xlabel="learning rate", ylabel="accuracy, %")
        plain = {rate: chosen(runs, task=task, rate=rate, kind="plain") for rate in rates}
        best = max(rates, key=lambda rate: mean(mean(values(plain[rate], n) or [0.0]) for n in SHOWN))
        for rate, colour in dict.fromkeys([(rates[0], "#8a8f98"), (best, "#d9822b")]):
            for kind, style in (("plain", "-o"), ("leap", "--^")):
                curve: dict[int, list[tuple[float, float]]] = defaultdict(list)
                for run in chosen(runs, task=task, rate=rate, kind=kind):
                    for point in run["points"]:
                        if "kind" not in point:
                            curve[point["trained"]].append((spent(run, point), 100 * point["accuracy"]))
                ends = [tuple(map(mean, zip(*some, strict=True))) for some in curve.values()]
                lower.plot(
                    *zip(*ends, strict=True),
                    style,
                    color=colour,
                    ms=4,
                    label=f"{rate}, {'with leaps' if kind == 'leap' else 'plain'}",
                )
        lower.set(xlabel="CPU seconds, choosing included", ylabel="accuracy, %")
        lower.legend(fontsize=7, frameon=False)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot")
    given = parser.parse_args()
    runs = load(given.files)
    tables(runs)
    how_table(runs)
    if given.json:
        given.json.write_text(json.dumps(runs) + "\n")
    if given.plot:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
