"""The report's first figure: where each algorithm puts its credit on the same responses, beside the exact values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..plots import new_figure
from .credit import CREDIT_NAME
from .results import StudyResults
from .task.vocabulary import CELLS


MOST_PANELS = 5


def credit_tables(results: StudyResults, arms: list[str]) -> dict[str, pd.DataFrame]:
    """
    The recorded credit of some arms, from the first world and seed that all of them have.

    Raises:
        ValueError: if the responses of two arms differ.
    """
    runs = results.runs[(results.runs["measure"] == "credit") & results.runs["arm"].isin(arms)]
    shared = runs.groupby(["world", "seed"])["arm"].nunique()
    complete = shared[shared == runs["arm"].nunique()]
    if complete.empty:
        return {}
    world, seed = complete.index[0]
    chosen = runs[(runs["world"] == world) & (runs["seed"] == seed)].set_index("arm")
    folders = {arm: Path(chosen.loc[arm, "folder"]) for arm in arms if arm in chosen.index}
    tables = {arm: pd.read_parquet(folder / CREDIT_NAME) for arm, folder in folders.items()}
    texts = {arm: ["".join(row) for row in table["tokens"]] for arm, table in tables.items()}
    first = next(iter(texts))
    for arm in texts:
        if texts[arm] != texts[first]:
            raise ValueError(f"The credit of `{arm}` and of `{first}` is of different responses: run both again.")
    return tables


def deciding_share(table: pd.DataFrame, column: str) -> float:
    """The share of the credit (absolute advantages) that lies on the tokens that name the chosen cells."""
    on_cells = sum(abs(a[_names_cell(t)]).sum() for a, t in zip(table[column], table["tokens"], strict=True))
    total = sum(abs(a).sum() for a in table[column])
    return float(on_cells / total) if total else float("nan")


def agreement(table: pd.DataFrame) -> float:
    """Pearson's correlation of the advantages with the exact ones, over all tokens."""
    ours, exact = (np.concatenate(list(table[name])) for name in ("advantages", "exact"))
    return float(np.corrcoef(ours, exact)[0, 1]) if ours.std() > 0 and exact.std() > 0 else float("nan")


def plot_credit(path: Path, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """
    Draw the exact credit and the credit of at most four algorithms, one panel each: a row per response, a column per
    token.

    Triangles point up where a token is praised and down where it is blamed; their area is the size, relative to the
    largest of the panel. Grey columns name the chosen cells.

    Args:
        path (`Path`): PNG to write.
        tables (`Mapping[str, pd.DataFrame]`): from [`credit_tables`].

    Returns:
        `pd.DataFrame`: the numbers, also of arms that are not drawn: `arm`, `problem`, `position`, `token` and
        `advantage`.
    """
    names = list(tables)[: MOST_PANELS - 1]
    panels = {"exact": (tables[names[0]], "exact"), **{name: (tables[name], "advantages") for name in names}}
    figure = new_figure(9.5, 2.9 * len(panels) + 0.5)
    data = []
    for name, (table, column) in {**panels, **{name: (tables[name], "advantages") for name in tables}}.items():
        for _, row in table.iterrows():
            for position, (token, value) in enumerate(zip(row["tokens"], row[column], strict=True)):
                data.append((name, row["problem"], position, token, value))
    for panel, (name, (table, column)) in zip(
        figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0], panels.items(), strict=True
    ):
        _panel(panel, table, column)
        panel.set_title("exact: the change of the probability of success" if name == "exact" else name, fontsize=10)
    panel.set_xticks(range(0, int(panel.get_xlim()[1]) + 1, 5))
    panel.set_xlabel("token of the response; grey: the token that names the chosen cell; left: ● right answer")
    title = "Credit on the same responses: ▲ praised, ▼ blamed, area relative to the panel's largest"
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    drawn = pd.DataFrame(data, columns=["arm", "problem", "position", "token", "advantage"])
    drawn.to_csv(path.with_suffix(".csv"), index=False, float_format="%.9g")
    return drawn


def _panel(panel: Axes, table: pd.DataFrame, column: str) -> None:
    largest = max((abs(row).max() for row in table[column] if len(row)), default=0) or 1.0
    for line, (_, row) in enumerate(table.iterrows()):
        for position in np.flatnonzero(_names_cell(row["tokens"])):
            panel.add_patch(_square(position, line))
        sizes = 60 * np.abs(row[column]) / largest
        for up, marker, face in ((True, "^", "white"), (False, "v", "black")):
            chosen = np.flatnonzero((row[column] > 0 if up else row[column] < 0) & (sizes > 0.3))
            panel.scatter(
                chosen,
                [line] * len(chosen),
                s=sizes[chosen],
                marker=marker,
                c=face,
                edgecolors="black",
                linewidths=0.7,
            )
        if row["reward"] > 0:
            panel.plot(-1.5, line, "o", color="black", markersize=4)
    panel.set_ylim(len(table) - 0.5, -0.5)
    panel.set_xlim(-2.5, max(map(len, table["tokens"])) - 0.5)
    panel.set_yticks([])
    panel.set_ylabel("responses")


def _square(position: int, line: int) -> Rectangle:
    return Rectangle((position - 0.5, line - 0.5), 1, 1, color="#dddddd", linewidth=0, zorder=0)


def _names_cell(tokens: Sequence[str]) -> np.ndarray:
    return np.array([token.strip() in CELLS and token.strip() != "" for token in tokens], dtype=bool)
