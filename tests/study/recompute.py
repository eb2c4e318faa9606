"""
Recomputes the numbers of a study's report from its published files, with formulas of its own:

    python -m tests.study.recompute trainer_configs/study/decisive.yaml docs/results.md FOLDER

It shares no code with the package: NumPy, SciPy, pandas and YAML only.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats


class Checked(Counter):
    """Counts the compared cells of each table."""

    def same(self, table: str, where: str, ours: str, reported: str) -> None:
        if ours != reported:
            raise AssertionError(f"{table}, {where}: recomputed {ours!r}, reported {reported!r}.")
        self[table] += 1


def recompute(study_file: Path, report_file: Path, folder: Path) -> Checked:
    """Compare every table of a report, and count the compared cells by table."""
    study, checked = yaml.safe_load(study_file.read_text()), Checked()
    tables = tables_of(report_file.read_text())
    runs = pd.read_csv(folder / "runs.csv")
    runs = runs[runs["measure"] == "accuracy"]
    check_verdicts(checked, study, tables, runs)
    check_experiments(checked, study, tables, runs)
    check_tuning(checked, tables, folder)
    check_credit(checked, tables, folder)
    check_lift(checked, tables, folder)
    check_borders(checked, tables, folder)
    check_ratios(checked, tables, folder)
    return checked


def tables_of(text: str) -> dict[tuple[str, str], list[list[dict[str, str]]]]:
    """The tables below each pair of headings of level 2 and 3, as rows of cells."""
    found: dict[tuple[str, str], list] = {}
    place, block = ("", ""), []
    for line in [*text.splitlines(), ""]:
        if line.startswith("## "):
            place = (line[3:], "")
        elif line.startswith("### "):
            place = (place[0], line[4:])
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
        elif block:
            header, _, *rows = block
            header = [name.strip("| ") for name in header]
            found.setdefault(place, []).append(
                [dict(itertools.zip_longest(header, (c.strip("| ") for c in row), fillvalue="")) for row in rows]
            )
            block = []
    return found


def plain(name: str) -> str:
    return name.replace("*", "").replace("`", "").split(" {")[0]


# ---------------------------------------------------------------------------------------------------------- statistics


def student(groups: list[tuple[float, np.ndarray]]) -> tuple[float, float, float, float, float]:
    """Value, low, high, t and degrees of freedom of a weighted sum of the groups' means."""
    value = sum(weight * x.mean() for weight, x in groups)
    squares = [weight**2 * x.var(ddof=1) / len(x) for weight, x in groups]
    total = sum(squares)
    if total == 0:
        return value, value, value, math.nan, math.nan
    freedom = total**2 / sum(s**2 / (len(x) - 1) for s, (_, x) in zip(squares, groups, strict=True))
    reach = stats.t.isf(0.025, freedom) * math.sqrt(total)
    return value, value - reach, value + reach, value / math.sqrt(total), freedom


def groups_of(cells: list[tuple[float, pd.DataFrame]], column: str) -> list[tuple[float, np.ndarray]]:
    groups = []
    for weight, runs in cells:
        worlds = sorted(runs["world"].unique())
        for world in worlds:
            groups.append((weight / len(worlds), runs.loc[runs["world"] == world, column].to_numpy(float)))
    return groups


def permutation(ours: pd.DataFrame, theirs: pd.DataFrame, side: str) -> float:
    """Counts the ways to reach each sum with a dictionary, world by world."""
    ways: dict[int, float] = {0: 1.0}
    for world in sorted(ours["world"].unique()):
        mine = ours.loc[ours["world"] == world, "correct"].astype(int).tolist()
        both = mine + theirs.loc[theirs["world"] == world, "correct"].astype(int).tolist()
        sums = Counter(sum(chosen) for chosen in itertools.combinations(both, len(mine)))
        further: dict[int, float] = {}
        for (a, n), (b, m) in itertools.product(ways.items(), sums.items()):
            further[a + b] = further.get(a + b, 0.0) + n * m
        ways = further
    total, found = sum(ways.values()), int(ours["correct"].sum())
    mean = sum(s * n for s, n in ways.items()) / total
    extreme = {
        "greater": lambda s: s >= found,
        "less": lambda s: s <= found,
        "two": lambda s: abs(s - mean) >= abs(found - mean) - 1e-6,
    }[side]
    return sum(n for s, n in ways.items() if extreme(s)) / total


def wilson(k: int, n: int) -> tuple[float, float]:
    z = stats.norm.isf(0.025)
    middle, reach = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return middle - reach, middle + reach


def newcombe(k: int, n: int, j: int, m: int) -> tuple[float, float, float]:
    (low, high), (q_low, q_high) = wilson(k, n), wilson(j, m)
    p, q = k / n, j / m
    down, up = math.hypot(p - low, q_high - q), math.hypot(high - p, q - q_low)
    return p - q, max(p - q - down, -1.0), min(p - q + up, 1.0)


def fisher(k: int, n: int, j: int, m: int, side: str) -> float:
    law = stats.hypergeom(n + m, k + j, n)
    if side == "less":
        return law.cdf(k)
    if side == "greater":
        return law.sf(k - 1)
    support = np.arange(max(0, k + j - m), min(n, k + j) + 1)
    return law.pmf(support)[law.pmf(support) <= law.pmf(k) * (1 + 1e-7)].sum()


def t_p_value(t: float, freedom: float, side: str) -> float:
    return {
        "greater": stats.t.sf(t, freedom),
        "less": stats.t.sf(-t, freedom),
        "two": 2 * stats.t.sf(abs(t), freedom),
    }[side]


# -------------------------------------------------------------------------------------------------------------- tables


def check_verdicts(checked: Checked, study: dict, tables: dict, runs: pd.DataFrame) -> None:
    tests = study.get("preregistered", {}).get("tests", {})
    if not tests or not any("claim" in rows[0] for rows in tables.get(("Verdicts", ""), [])):
        return
    reported = next(rows for rows in tables["Verdicts", ""] if "claim" in rows[0])
    rows = []
    for name, test in tests.items():
        experiment = study["experiments"][test["experiment"]]
        cells = []
        for key, weight in test["contrast"].items():
            arm, _, task = (part.strip() for part in key.partition("@"))
            cells.append((weight, of_experiment(study, runs, experiment, task or experiment["tasks"][0], arm)))
        rows.append((name, test, cells, *effect_and_p(test, cells)))
    order = sorted(range(len(rows)), key=lambda i: rows[i][4])
    adjusted, largest = {}, 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, rows[i][4] * (len(rows) - rank)))
        adjusted[i] = largest
    level = study["preregistered"].get("level", 0.05)
    assert len(reported) == len(rows), "Another number of verdicts is reported."
    for i, ((name, test, cells, (value, low, high), p), row) in enumerate(zip(rows, reported, strict=True)):
        side, smallest = test.get("side", "greater"), test["smallest"]
        sign = -1 if side == "less" else 1
        if adjusted[i] < level and value * sign > 0:
            verdict = "held"
        elif (high < smallest) if sign > 0 else (low > -smallest):
            verdict = "not held"
        else:
            verdict = "cannot tell"
        worlds = sorted(cells[0][1]["world"].unique())
        agree = 0
        for world in worlds:
            part = [(weight, x[x["world"] == world]) for weight, x in cells]
            agree += effect_and_p(test, part)[0][0] * value > 0
        checked.same("verdicts", name, f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", row["effect [95 %]"])
        checked.same("verdicts", name, f"{p:.2g}", row["p"])
        checked.same("verdicts", name, f"{adjusted[i]:.2g}", row["p (Holm)"])
        checked.same("verdicts", name, f"{agree} of {len(worlds)}", row["worlds that agree"])
        checked.same("verdicts", name, f"{len(cells[0][1])} each, {len(worlds)} worlds", row["runs"])
        checked.same("verdicts", name, verdict, re.match(r"\*\*(.*?)\*\*", row["verdict"]).group(1))


def effect_and_p(test: dict, cells: list) -> tuple[tuple[float, float, float], float]:
    side = test.get("side", "greater")
    if test["test"] == "fisher":
        ours, theirs = (x for _, x in sorted(cells, key=lambda cell: -cell[0]))
        four = (int(ours["lost_form"].sum()), len(ours), int(theirs["lost_form"].sum()), len(theirs))
        return newcombe(*four), fisher(*four, side)
    if test["test"] == "trend":
        numbers = np.array([weight for weight, _ in cells], dtype=float)
        slope = (numbers - numbers.mean()) / ((numbers - numbers.mean()) ** 2).sum()
        cells = list(zip(slope, (x for _, x in cells), strict=True))
    value, low, high, t, freedom = student(groups_of(cells, test["measure"]))
    if test["test"] == "permutation":
        ours, theirs = (x for _, x in sorted(cells, key=lambda cell: -cell[0]))
        return (value, max(low, -1.0), min(high, 1.0)), permutation(ours, theirs, side)
    return (value, low, high), t_p_value(t, freedom, side)


def of_experiment(study: dict, runs: pd.DataFrame, experiment: dict, task: str, arm: str) -> pd.DataFrame:
    worlds = experiment.get("worlds") or [study["tasks"][task].get("world", 0)]
    chosen = (runs["task"] == task) & (runs["arm"] == arm)
    return runs[chosen & runs["seed"].isin(experiment["seeds"]) & runs["world"].isin(worlds)]


def check_experiments(checked: Checked, study: dict, tables: dict, runs: pd.DataFrame) -> None:
    for name, experiment in study["experiments"].items():
        if experiment.get("measure", "accuracy") != "accuracy":
            continue
        heading = name.replace("_", " ").capitalize()
        for task in experiment["tasks"]:
            (rows,) = tables[heading, task if len(experiment["tasks"]) > 1 else ""]
            reference = of_experiment(study, runs, experiment, task, study.get("baseline", "sapo"))
            for row in rows:
                arm = plain(row["arm"])
                ours = of_experiment(study, runs, experiment, task, arm)
                check_row(checked, f"{heading}, {task}, {arm}", row, ours, reference, study.get("baseline", "sapo"))


def check_row(checked: Checked, where: str, row: dict, ours: pd.DataFrame, reference: pd.DataFrame, base: str) -> None:
    table = "experiments"
    checked.same(table, where, str(len(ours)), row["runs"])
    checked.same(table, where, interval([(1.0, ours)], "log_odds", ".2f"), row["log-odds"])
    if "log-odds of readings" in row:
        checked.same(table, where, interval([(1.0, ours)], "reading_log_odds", ".2f"), row["log-odds of readings"])
    difference = ""
    if plain(row["arm"]) != base and set(reference["world"]) == set(ours["world"]):
        difference = interval([(1.0, ours), (-1.0, reference)], "log_odds", "+.2f")
    checked.same(table, where, difference, row[f"minus `{base}`"])
    scores = np.sort(ours["accuracy"])
    median = f"{np.median(scores):.3f}"
    ranks = [k for k in range(1, len(scores) // 2 + 1) if 2 * stats.binom.cdf(k - 1, len(scores), 0.5) <= 0.05]
    if ranks:
        median += f" [{scores[max(ranks) - 1]:.3f}, {scores[-max(ranks)]:.3f}]"
    checked.same(table, where, median, row["accuracy (median)"])
    checked.same(table, where, f"{scores.mean():.3f}", row["accuracy (mean)"])
    checked.same(table, where, f"{int((ours['complete'] < 0.5).sum())} of {len(ours)}", row["lost form"])
    costs = {"responses": "completions", "steps": "optimizer_steps", "rollout tokens": "rollout_tokens"}
    for title, column in (costs | {"sampled tokens": "sampled_tokens"}).items():
        checked.same(table, where, f"{ours[column].mean():,.0f}", row[title])
    checked.same(table, where, f"{ours['cpu_seconds'].mean():.0f}", row["CPU seconds"])


def interval(cells: list, column: str, form: str) -> str:
    groups = groups_of(cells, column)
    if any(len(x) < 2 for _, x in groups):
        return f"{sum(weight * x.mean() for weight, x in groups):{form}}"
    value, low, high, *_ = student(groups)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def check_tuning(checked: Checked, tables: dict, folder: Path) -> None:
    if ("Tuning", "") not in tables:
        return
    runs = pd.read_csv(folder / "tuning.csv")
    (rows,) = tables["Tuning", ""]
    for row in rows:
        arm, _, settings = row["arm"].partition(" ")
        of_arm = runs[(runs["arm"] == plain(arm)) & (runs["settings"] == (settings or "{}"))]
        means = of_arm.groupby("learning_rate")["accuracy"].mean()
        for rate, mean in means.items():
            checked.same("tuning", row["arm"], f"{mean:.3f}", row[f"{rate:g}"])
        best = runs[runs["arm"] == plain(arm)].groupby(["learning_rate", "choice"])["accuracy"].mean()
        rate, choice = best.index[int(np.argmax(best.to_numpy()))]
        chosen = f"{rate:g}" if choice == of_arm["choice"].iloc[0] else ""
        checked.same("tuning", row["arm"], chosen, row["chosen"].partition(" ")[0])


def check_credit(checked: Checked, tables: dict, folder: Path) -> None:
    rows = next((t for t in tables.get(("Verdicts", ""), []) if "credit of" in t[0]), None)
    if rows is None:
        return
    credit = pd.read_csv(folder / "credit.csv", keep_default_na=False)
    exact = credit[credit["arm"] == "exact"].set_index(["problem", "position"])["advantage"].astype(float)
    for row in rows:
        ours = credit[credit["arm"] == plain(row["credit of"])].set_index(["problem", "position"])
        size, on_cells = ours["advantage"].astype(float).abs(), ours["token"].str.fullmatch(" ?[ABCD]")
        share = size[on_cells].sum() / size.sum() if size.sum() else math.nan
        checked.same("credit", row["credit of"], f"{share:.2f}", row["on the chosen cells"])
        if plain(row["credit of"]) != "exact":
            both = ours["advantage"].astype(float).to_numpy()
            known = both.std() > 0 and exact.std(ddof=0) > 0
            correlation = stats.pearsonr(both, exact.to_numpy()).statistic if known else math.nan
            text = f"{correlation:.2f}" if known else ""
            checked.same("credit", row["credit of"], text, row["correlation"])


# ---------------------------------------------------------------------------------------------------------- recordings


def per_run(table: pd.DataFrame):
    return table.groupby(["arm", "task", "world", "seed"], sort=True)


def mean_text(scores: list[float], digits: int, most: float = math.inf) -> str:
    x = np.array(scores)
    if len(x) < 2:
        return f"{x[0]:.{digits}f}"
    reach = stats.t.isf(0.025, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    low, high = max(x.mean() - reach, 0.0), min(x.mean() + reach, most)
    return f"{x.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def lift(pairs: list[tuple[np.ndarray, np.ndarray]], share: float = 0.3) -> float:
    """Lift of the jumps of some responses, each as its entropies and jumps."""
    above = total = 0.0
    for entropies, jumps in pairs:
        left = share * len(jumps)
        total += share * jumps.sum()
        for entropy in sorted(set(entropies), reverse=True):  # equal entropies share their jumps
            tied = jumps[entropies == entropy]
            taken = min(left, len(tied))
            above += taken * tied.mean()
            left -= taken
            if left <= 1e-12:
                break
    return above / total if total else math.nan


def check_lift(checked: Checked, tables: dict, folder: Path) -> None:
    rows = next(iter(tables.get(("Do values jump where entropy is high?", ""), [])), None)
    if rows is None:
        return
    responses, states, logs = (pd.read_parquet(folder / f"{n}.parquet") for n in ("responses", "values", "logs"))
    responses = responses[responses["arm"].isin(logs.loc[logs["critic/explained_variance"].notna(), "arm"])]
    found: dict[tuple[str, str], list[float]] = {}
    of_states = dict(iter(per_run(states)))
    for key, table in per_run(responses):
        pairs = [
            (np.asarray(e, float)[:-1], abs(np.diff(np.asarray(v, float))))
            for e, v in zip(table["entropies"], table["values"], strict=True)
        ]
        pairs = [pair for pair in pairs if len(pair[0])]
        if any(jumps.any() for _, jumps in pairs):
            found.setdefault((key[0], "critic's values"), []).append(lift(pairs))
        if key in of_states:
            of_run = lift(state_jumps(table, of_states[key]))
            if not math.isnan(of_run):
                found.setdefault((key[0], "Monte-Carlo values"), []).append(of_run)
    for row in rows:
        scores = found[plain(row["arm"]), row["values"]]
        checked.same("lift", row["arm"], str(len(scores)), row["runs"])
        checked.same("lift", row["arm"], mean_text(scores, 2), row["Lift(0.3)"])


def state_jumps(responses: pd.DataFrame, states: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for _, response in responses.iterrows():
        same = (states["step"] == response["step"]) & (states["response"] == response["response"])
        known = states[same].set_index("segment")["monte_carlo_value"].dropna()
        ids = np.asarray(response["segment_ids"])
        cut = {int(i): float(np.asarray(response["entropies"])[np.flatnonzero(ids == i)[-1]]) for i in set(ids)}
        both = [segment for segment in known.index if segment + 1 in known.index and segment in cut]
        if both:
            entropies = np.array([cut[segment] for segment in both])
            pairs.append((entropies, np.array([abs(known[s + 1] - known[s]) for s in both])))
    return pairs


def check_borders(checked: Checked, tables: dict, folder: Path) -> None:
    rows = next(iter(tables.get(("Do cuts fall on true borders?", ""), [])), None)
    if rows is None:
        return
    found: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for key, table in per_run(pd.read_parquet(folder / "responses.parquet")):
        counts = {kind: np.zeros(4) for kind in ("ends of steps", "decisions")}
        for tokens, ids in zip(table["tokens"], table["segment_ids"], strict=True):
            last = len(ids) - 1
            cuts = {i for i in range(last) if ids[i] != ids[i + 1]}
            for kind, places in borders(list(tokens)).items():
                inner = {place for place in places if place < last}
                expected = len(cuts) * len(inner) / last if last else 0.0
                counts[kind] += (len(cuts & inner), len(cuts), len(inner), expected)
        if counts["decisions"][1]:
            for kind, (hits, cuts, places, expected) in counts.items():
                numbers = [
                    a / b if b else math.nan
                    for a, b in ((hits, cuts), (expected, cuts), (hits, places), (expected, places))
                ]
                found.setdefault((key[0], kind), []).append(tuple(numbers))
    for row in rows:
        precision, chance, recall, by_chance = zip(*found[plain(row["arm"]), row["places"]], strict=True)
        checked.same("borders", row["arm"], mean_text(precision, 3, 1.0), row["cuts on them"])
        checked.same("borders", row["arm"], f"{np.mean(chance):.3f}", row["by chance"])
        checked.same("borders", row["arm"], mean_text(recall, 3, 1.0), row["of them cut"])
        checked.same("borders", row["arm"], f"{np.mean(by_chance):.3f}", row["of them by chance"])


def borders(tokens: list[str]) -> dict[str, set[int]]:
    """Tokens that end a line, and those that name a cell before its number in a line that begins with a label."""
    covering = [i for i, token in enumerate(tokens) for _ in token]
    text = "".join(tokens)
    steps = {covering[i] for i, character in enumerate(text) if character == "\n"}
    decisions, start = set(), 0
    for line in text.split("\n"):
        if re.match("[a-p] ", line):
            cell = re.search(" [ABCD][0-9]", line[1:])
            if cell:
                decisions.add(covering[start + 1 + cell.start() + 1])
        start += len(line) + 1
    return {"ends of steps": steps, "decisions": decisions}


def check_ratios(checked: Checked, tables: dict, folder: Path) -> None:
    title = "How far is a segment's geometric-mean ratio from its tokens' mean ratio?"
    rows = next(iter(tables.get((title, ""), [])), None)
    if rows is None:
        return
    logs = pd.read_parquet(folder / "logs.parquet").dropna(
        subset=["ratio/geometric_bias", "ratio/geometric_bias_bound"]
    )
    found: dict[str, list[tuple[float, float, float]]] = {}
    for key, log in per_run(logs):
        bias, bound = log["ratio/geometric_bias"].to_numpy(float), log["ratio/geometric_bias_bound"].to_numpy(float)
        if (bound > 0).any():
            found.setdefault(key[0], []).append((bias.mean(), bias.max(), (bias[bound > 0] / bound[bound > 0]).mean()))
    for row in rows:
        mean, largest, share = zip(*found[plain(row["arm"])], strict=True)
        checked.same("ratios", row["arm"], str(len(mean)), row["runs"])
        checked.same("ratios", row["arm"], f"{np.median(mean):.2g}", row["mean bias (median run)"])
        checked.same("ratios", row["arm"], f"{max(largest):.2g}", row["largest bias (any run)"])
        checked.same("ratios", row["arm"], f"{np.median(share):.2f}", row["share of the bound (median run)"])


if __name__ == "__main__":
    print(dict(recompute(*map(Path, sys.argv[1:4]))))
