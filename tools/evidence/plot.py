"""Tables and a plot of what `study.py` measured.

usage: python tools/evidence/plot.py RUNS/*/seed-*.json --json docs/evidence.json --plot docs/evidence.png
       python tools/evidence/plot.py docs/evidence.json --plot docs/evidence.png

Takes JSON files of one study each, or of a list of them, and prints tables in Markdown. --json writes all of them as one
list. --plot needs matplotlib (pip install -e ".[docs]"), the tables do not.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("relex", "pinned", "advised")
COLORS = {0.15: "tab:orange", 0.30: "tab:blue"}
MARKERS = {"relex": "o", "pinned": "^", "advised": "s"}
LINES = {"relex": "-", "pinned": "--", "advised": ":"}

Study = dict[str, Any]


def read(paths: list[Path]) -> list[Study]:
    """All studies of the files, by task and seed."""
    found: list[Study] = []
    for path in paths:
        content = json.loads(path.read_text())
        found += content if isinstance(content, list) else [content]
    return sorted(found, key=lambda study: (study["task"], study["seed"]))


def by_task(studies: list[Study]) -> dict[str, list[Study]]:
    found = defaultdict(list)
    for study in studies:
        found[study["task"]].append(study)
    return dict(found)


def predictions(studies: list[Study]) -> list[dict[str, Any]]:
    """Every prediction, with its window's share, and its accuracy minus that of the last observed checkpoint (gain) and of
    the step as trained (ahead)."""
    return [
        {
            "task": study["task"],
            "share": window["share"],
            "gain": p["accuracy"] - study["trained"][str(window["end"])],
            "ahead": p["accuracy"] - study["trained"][str(p["step"])],
            **p,
        }
        for study in studies
        for window in study["windows"]
        for p in window["predictions"]
    ]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; NaN where one side is constant."""
    first, second = _ranks(a), _ranks(b)
    if not a or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    array = np.asarray(values)
    return (array[:, None] > array).sum(axis=1) + ((array[:, None] == array).sum(axis=1) - 1) / 2


def _table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others]) + "\n"


def _percents(values: list[float]) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values)


def _skills(values: list[float | None]) -> str:
    return " ".join("-" if value is None or math.isnan(value) else f"{value:+.2f}" for value in values)


def prediction_table(studies: list[Study]) -> str:
    """One row for each task, window and target; in each cell a figure for each seed."""
    rows = []
    for task, runs in by_task(studies).items():
        for w, window in enumerate(runs[0]["windows"]):
            for step in sorted({p["step"] for p in window["predictions"]}):
                found = {
                    method: [p for run in runs for p in run["windows"][w]["predictions"]
                             if (p["method"], p["step"]) == (method, step)]
                    for method in METHODS
                }  # fmt: skip
                rows.append([
                    task,
                    f"1..{window['end']}",
                    str(step),
                    _percents([run["trained"][str(window["end"])] for run in runs]),
                    _percents([run["trained"][str(step)] for run in runs]),
                    *(_percents([p["accuracy"] for p in found[method]]) for method in METHODS),
                    *(_skills([p["skill"] for p in found[method]]) for method in METHODS),
                ])  # fmt: skip
    head = ["task", "window", "step", "last observed", "trained", *METHODS, *(f"skill, {m}" for m in METHODS)]
    return _table(head, rows)


def advice_table(studies: list[Study]) -> str:
    """One row for each run and window: what the backtest recommends, how far, and what came of it there."""
    rows = [
        [
            f"{study['task']}, seed {study['seed']}",
            f"1..{window['end']}",
            f"{advice['recipe']}, window {advice['window']}, strength {advice['strength']:g}",
            advice["sure"],
            f"{advice['score']:+.2f}",
            str(advice["farthest"]),
            _percents([study["trained"][str(window["end"])]]),
            _percents([advice["accuracy"]]),
            _percents([study["trained"][str(advice["farthest"])]]),
        ]
        for study in studies
        for window in study["windows"]
        for advice in [window["advice"]]
    ]
    head = ["run", "window", "advised", "sure", "mean skill", "farthest step", "last observed", "predicted", "trained"]
    return _table(head, rows)


def run_table(studies: list[Study]) -> str:
    """One row for each run: where it began and ended, and how it moved."""
    rows = [
        [
            f"{s['task']}, seed {s['seed']}",
            _percents([s["base"]]),
            _percents([s["trained"][str(s["steps"])]]),
            *(_skills(list(window["backtest"].values())) for window in s["windows"]),
            f"{s['energy']:.2f}",
            f"{100 * s['changed']['1']:.1f}",
            f"{100 * s['changed'][str(s['steps'])]:.0f}",
            f"{s['seconds_per_step']:.2f}",
        ]
        for s in studies
    ]
    backtests = [f"backtest at {100 * w['share']:.0f} %: {', '.join(w['backtest'])}" for w in studies[0]["windows"]]
    head = ["run", "base", "last step", *backtests, "energy", "changed at step 1, %", "at the last, %", "s a step"]
    return _table(head, rows)


def reconstruction_table(studies: list[Study]) -> str:
    """Accuracy of steps as trained and as rank 1 of the whole run keeps them; in each cell a figure for each seed."""
    rows = [
        [
            task,
            step,
            _percents([run["trained"][step] for run in runs]),
            _percents([run["reconstructed"][step] for run in runs]),
        ]
        for task, runs in by_task(studies).items()
        for step in runs[0]["reconstructed"]
    ]
    return _table(["task", "step", "trained", "reconstructed"], rows)


def summary_table(studies: list[Study]) -> str:
    """Predictions counted by task, window and method, and how skill and backtest rank their gains."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for p in predictions(studies):
        groups[p["task"], f"{100 * p['share']:.0f} %", p["method"]].append(p)
        groups["all", "both", p["method"]].append(p)
    rows = []
    for key, group in sorted(groups.items(), key=lambda item: (item[0][0] == "all", item[0])):
        gains = [p["gain"] for p in group]
        tested = [p for p in group if p["expected"] is not None]
        rows.append([
            *key,
            f"{sum(gain > 0 for gain in gains)} of {len(group)}",
            f"{100 * np.mean(gains):+.1f}",
            f"{100 * np.mean([p['ahead'] for p in group]):+.1f}",
            f"{sum(p['skill'] > 0 for p in group)} of {len(group)}",
            _skills([rank_correlation([p["skill"] for p in group], gains)]),
            f"{_skills([rank_correlation([p['expected'] for p in tested], [p['gain'] for p in tested])])} ({len(tested)})",
        ])  # fmt: skip
    head = [
        "task",
        "window",
        "method",
        "better than last observed",
        "mean gain",
        "mean against trained",
        "skill above 0",
    ]
    return _table([*head, "skill and gain", "backtest and gain (of)"], rows)


def draw(studies: list[Study], path: Path) -> None:
    """A row for each task: a panel for each seed, and skill against gain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = by_task(studies)
    columns = max(map(len, tasks.values())) + 1
    figure, axes = pyplot.subplots(len(tasks), columns, figsize=(3.6 * columns, 3.4 * len(tasks)), squeeze=False)
    for row, runs in zip(axes, tasks.values(), strict=True):
        for axis, run in zip(row, runs, strict=False):
            _draw_run(axis, run)
        _draw_skill(row[-1], predictions(runs))
        row[0].set_ylabel("accuracy, %")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12 / len(tasks), 1, 1))
    figure.savefig(path, dpi=110)


def _draw_run(axis: Any, run: Study) -> None:
    steps = [0, *map(int, run["trained"])]
    accuracies = [run["base"], *run["trained"].values()]
    axis.plot(steps, [100 * a for a in accuracies], color="black", linewidth=1.2, label="trained")
    axis.plot(
        [*map(int, run["reconstructed"])], [100 * a for a in run["reconstructed"].values()],
        "x", color="black", label="reconstructed, rank 1",
    )  # fmt: skip
    for window in run["windows"]:
        color, start = COLORS[window["share"]], (window["end"], 100 * run["trained"][str(window["end"])])
        axis.axvline(window["end"], color=color, linewidth=0.7, linestyle=":")
        for method in METHODS:
            points = [(p["step"], 100 * p["accuracy"]) for p in window["predictions"] if p["method"] == method]
            axis.plot(
                *zip(start, *points, strict=True), marker=MARKERS[method], markersize=4, linewidth=0.8, color=color,
                linestyle=LINES[method], markevery=range(1, len(points) + 1),
                label=f"{method}, first {100 * window['share']:.0f} %",
            )  # fmt: skip
    axis.set_title(f"{run['task']}, {run['model'].removesuffix('ForCausalLM')}, seed {run['seed']}", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylim(0, 103)
    axis.set_xlim(0, None)


def _draw_skill(axis: Any, found: list[dict[str, Any]]) -> None:
    for p in found:
        axis.plot(p["skill"], 100 * p["gain"], MARKERS[p["method"]], markersize=4, color=COLORS[p["share"]])
    axis.axhline(0, color="gray", linewidth=0.7)
    axis.axvline(0, color="gray", linewidth=0.7)
    axis.set_title(f"{found[0]['task']}: skill and gain", fontsize=10)
    axis.set_xlabel("skill in weights at the target")
    axis.set_ylabel("points over last observed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write all studies as one list")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    given = parser.parse_args()
    studies = read(given.files)
    for table in (run_table, prediction_table, advice_table, reconstruction_table, summary_table):
        print(table(studies))
    if given.json:
        given.json.write_text(json.dumps(studies, indent=1) + "\n")
    if given.plot:
        draw(studies, given.plot)


if __name__ == "__main__":
    main()
