"""
The power of the decisive study, before its runs:
    python -m benchmarks.study_power

Two parts. The first is a tabular chain: the study's task with a table of log-odds in place of a model, and a critic
that knows the remarks so far, and nothing else. It predicts where granularity matters. The second is the power of
the preregistered tests, with the spread of the published runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from sapo_trl.study.config import load_study


STUDY = Path(__file__).parents[1] / "trainer_configs" / "study" / "decisive.yaml"
PUBLISHED = Path(__file__).parent / "results" / "granularity" / "runs.csv"
UNITS = {"token": 7.0, "segment": 2.2, "line": 1.0}
"""Advantages in a line: it has seven tokens, and cuts at 30 % of all tokens make 2.2 segments."""
GATES, SIGNS, ROLLOUTS, RESPONSES = 6, 48, 24, 32


def chain(unit: str, lam: float, delay: int, rate: float, runs: int, seed: int = 0) -> np.ndarray:
    """
    Mean log-odds of right decisions after training, of each run.

    The policy is a table: a log-odds of the right cell for each sign. The value of a state is the probability that the
    rest is right, if the text has said nothing bad so far, and else 0. So the temporal differences lie where the text
    speaks: `delay` steps after a decision, at the end for the last ones. A decision's advantage is the sum of the
    differences from there on, each discounted by λ for every unit between.
    """
    rng = np.random.default_rng(seed)
    known = np.sort(rng.random((runs, SIGNS)), axis=1).argsort(axis=1) < round(0.8 * SIGNS)
    odds = np.where(known, 1.0, -1.0) * np.log(0.8 / 0.2)
    moment = np.zeros_like(odds)
    row = np.arange(runs)[:, None, None]
    # Units between a decision of gate i and the remark on gate j.
    said = np.minimum(np.arange(GATES) + delay, GATES) * UNITS[unit] + (0.3 * UNITS[unit])
    made = np.arange(GATES) * UNITS[unit]
    discount = lam ** np.clip(said[None, :] - made[:, None], 0, None) * (said[None, :] >= made[:, None])
    for _ in range(ROLLOUTS):
        for _ in range(4):  # optimizer steps, each on a quarter of the responses
            signs = rng.integers(SIGNS, size=(runs, RESPONSES // 4, GATES))
            chance = 1 / (1 + np.exp(-odds[row, signs]))
            right = rng.random(chance.shape) < chance
            # Values before and after each remark: the product of the chances that are still open.
            ahead = np.cumprod(chance[..., ::-1], axis=-1)[..., ::-1]
            after = np.concatenate([ahead[..., 1:], np.ones_like(ahead[..., :1])], axis=-1)
            alive = np.cumprod(right, axis=-1)
            before = np.concatenate([np.ones_like(ahead[..., :1]), alive[..., :-1]], axis=-1)
            differences = alive * after - before * ahead
            advantages = differences @ discount.T
            advantages -= advantages.mean(axis=(1, 2), keepdims=True)
            gradient = np.zeros_like(odds)
            np.add.at(gradient, (np.broadcast_to(row, signs.shape), signs), advantages * (right - chance))
            # As Adam does, the step's size does not depend on the gradient's.
            moment = 0.95 * moment + 0.05 * gradient**2
            odds += rate * gradient / (np.sqrt(moment.mean(axis=1, keepdims=True)) + 1e-12)
    return odds.mean(axis=1)


def print_chain(rate: float = 0.05, runs: int = 200) -> None:
    found = {}
    print("Tabular chain: mean log-odds (standard deviation over runs)")
    for delay in (0, 2):
        for lam in (0.99, 0.9, 0.8):
            cells = {unit: chain(unit, lam, delay, rate, runs) for unit in UNITS}
            found |= {(unit, lam, delay): x for unit, x in cells.items()}
            text = ", ".join(f"{unit} {x.mean():.2f} ({x.std(ddof=1):.2f})" for unit, x in cells.items())
            print(f"  delay {delay}, lambda {lam}: {text}")
    for lam in (0.9, 0.8):
        late = found["token", lam, 2].mean() - found["segment", lam, 2].mean()
        contrast = late - (found["token", 0.99, 0].mean() - found["segment", 0.99, 0].mean())
        print(f"  (token - segment) at delay 2, lambda {lam}, minus the same at delay 0, lambda 0.99: {contrast:+.2f}")


def power(effect: float, error: float, freedom: float, level: float, one_sided: bool = True) -> float:
    """Power of a t-test of an effect with this standard error."""
    critical = stats.t.ppf(1 - level / (1 if one_sided else 2), freedom)
    return float(stats.nct.sf(critical, freedom, effect / error))


def print_power() -> None:
    runs = pd.read_csv(PUBLISHED)
    runs = runs[(runs["task"] == "picture_6") & (runs["measure"] == "accuracy")]
    runs["log_odds"] = np.log(runs["right_decisions"] / (1 - runs["right_decisions"]))
    spread = runs.groupby("arm")["log_odds"].agg(["mean", "std", "count"])
    tests = len(load_study(STUDY).preregistered.tests)
    level = 0.05 / tests
    pooled = float(np.sqrt((spread["std"] ** 2 * (spread["count"] - 1)).sum() / (spread["count"] - 1).sum()))
    print(f"\nPower at level 0.05 / {tests} (the first step of Holm's method), one-sided; a run's log-odds spread by")
    print(f"{pooled:.2f} in the published study (all arms together; the share of right decisions, as log-odds)")
    one, control = spread.loc["vineppo"], spread.loc["reinforce"]
    error = np.sqrt((one["std"] ** 2 + control["std"] ** 2) / 20)
    print(f"  exact_credit, 20 runs each, effect as published {one['mean'] - control['mean']:.2f}: ", end="")
    print(f"{power(one['mean'] - control['mean'], error, 30, level):.3f}")
    for label, runs_each, cells in (("two arms", 20, 2), ("two arms", 10, 2), ("four cells", 20, 4)):
        error = pooled * np.sqrt(cells / runs_each)
        effects = [0.4, 0.6, 0.8, 1.0]
        text = ", ".join(f"{e}: {power(e, error, (runs_each - 5) * cells, level):.2f}" for e in effects)
        print(f"  {label}, {runs_each} runs each, by effect: {text}")
    rng = np.random.default_rng(0)
    for ours, theirs in ((0.1, 0.5), (0.1, 0.7), (0.3, 0.7)):
        pairs = rng.binomial(25, (ours, theirs), size=(4000, 2))
        values = {tuple(p): stats.fisher_exact([[p[0], 25 - p[0]], [p[1], 25 - p[1]]], "less").pvalue for p in pairs}
        share = np.mean([values[tuple(p)] < level for p in pairs])
        print(f"  share of lost runs {ours} against {theirs}, 25 runs each, Fisher: {share:.2f}")


if __name__ == "__main__":
    print_chain()
    print_power()
