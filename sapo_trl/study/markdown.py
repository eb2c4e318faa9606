"""Markdown tables."""

import pandas as pd


def markdown_table(table: pd.DataFrame) -> str:
    """A table of texts and numbers, with its column names as header; missing entries stay empty."""
    header = [str(name) for name in table.columns]
    rows = [["" if pd.isna(value) else str(value) for value in row] for row in table.to_numpy(dtype=object)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
