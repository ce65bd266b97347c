"""Facts of a run that nobody trained, as large as wanted, for the pages made of them."""

import numpy as np

from relexio.methods import Window
from relexio.methods.backtest import backtest
from relexio.methods.line_tests import straightness, walk_gram
from relexio.methods.spectrum import TensorFindings, alike, find, left_over, thrown_away
from relexio.methods.trials import STRENGTHS, make_folds, make_trials
from relexio.methods.verdict import advise
from relexio.report.data import Facts, Score, default_target
from relexio.store.schema import lay_out
from relexio.store.store import Store
from relexio.verbs.backtest import Judgement
from relexio.verbs.findings import Findings
from relexio.verbs.inspect import Sizes

_IN_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip


def names(layers: int) -> list[str]:
    """Tensors of a model with so many layers: 11 in each, and 3 outside."""
    inside = [f"model.layers.{i}.{name}.weight" for i in range(layers) for name in _IN_LAYER]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def made_up(tensors: list[str], steps: tuple[int, ...], drift: float = 0.3, seed: int = 0) -> Facts:
    """A run whose tensors drift along a line by so much of a random walk's size. The backtest is that of a few of them."""
    rng, at = np.random.default_rng(seed), np.array(steps, float)
    walk, line = walk_gram(at), np.outer(at, at) / at[-1]
    store = Store("made-up/run.zarr", 1024, lay_out(dict.fromkeys(tensors, ("BF16", (64, 32))), 1024), (), "0" * 64)
    grams: dict[str, np.ndarray] = {}
    found, left, lengths = [], np.zeros_like(walk), np.zeros(len(at))
    for name in tensors:
        gram = rng.uniform(0.2, 2) * (walk + drift * rng.uniform(0, 3) * line)
        if len(grams) < 12:
            grams[name] = gram
            window = Window(gram, np.array(steps))
            one = find(window, 1)
            left, lengths = left + left_over(window, 1), lengths + np.diag(gram)
        noisy = one.coefficients * rng.uniform(0.7, 1.3) + 0.02 * np.sqrt(at) * rng.standard_normal(len(at))
        found.append(
            TensorFindings(
                name,
                changed=rng.uniform(0.05, 0.4),
                energy=rng.uniform(0.8, 0.99),
                sigma2=float(np.trace(gram)),
                spectrum=one.spectrum,
                coefficients=noisy,
                line=one.line,
            )
        )
    findings = Findings(
        store, steps, 1, found, one.spectrum, thrown_away(left, lengths), alike(left), _judge(store, steps, grams)
    )
    changed = np.outer(rng.uniform(100, 600, len(tensors)), (at / at[-1]) ** 0.6).astype(np.int64)
    last = steps[-1]
    scores = (
        Score("base", 0, 0.26, 0.014),
        Score("observed", last, 0.35, 0.015),
        *(Score("pinned, strength 0.5", last * n, 0.35 + 0.05 * n - 0.02 * n**2, 0.015) for n in (2, 3, 5)),
        Score("relex, strength 1", 2 * last, 0.41),
    )
    return Facts(findings, Sizes(10**12, 2 * 10**9, 10**9, 10**7), changed, default_target(findings), scores)


def _judge(store: Store, steps: tuple[int, ...], grams: dict[str, np.ndarray]) -> Judgement | None:
    if len(steps) < 3:
        return None
    at = np.array(steps)
    trials = [trial for trial in make_trials(len(steps)) if trial.share == 1 and trial.recipe.curve == "line"]
    trials = [trial for trial in trials if trial.recipe.refit is None]
    test = backtest(grams.items(), len(grams), at, trials, make_folds(at), STRENGTHS)
    return Judgement(store, steps, test, advise(test), straightness(grams.values(), at))
