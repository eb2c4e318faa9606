"""Names of metrics: old names in the log for one release, and in every log that is read."""

import ast
import json
import math
import re
import tomllib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from sapo_trl.callbacks import ValueDiagnostics
from sapo_trl.metric_names import OLD_NAMES, OLD_NAMES_UNTIL, with_old_names, with_present_names
from sapo_trl.recordings.log import read_log_history
from sapo_trl.recordings.run import read_recording
from sapo_trl.study.results import metrics_of
from sapo_trl.study.run_cell import METRICS_NAME
from sapo_trl.trainer.model_card import complete_model_card
from sapo_trl.trainer.trl.log import PendingLog
from tests.testing_utils import fixed_rollout, logged, random_completions, sapo_trainer


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
ROOT = Path(__file__).parents[1]
PRESENT = sorted(OLD_NAMES.values())
OTHERS = ["step", "reward", "kl", "time/value", "time/value_diagnostics", "returns/mean", "policy_loss"]
OLD_ENTRY = {"step": 1, "reward": 0.5, "value_loss": 0.25, "value/mean": 0.4, "critic_lr": 1e-3}
PRESENT_ENTRY = {
    "step": 2,
    "reward": 0.5,
    "critic/loss": 0.125,
    "critic/mean_value": 0.6,
    "critic/learning_rate": 1e-4,
}


def test_each_old_name_has_one_present_name_in_the_critics_group():
    assert len(PRESENT) == len(set(PRESENT)) == 16 and not set(PRESENT) & OLD_NAMES.keys()
    assert [name for name in PRESENT if not name.startswith("critic/")] == []


@given(
    st.dictionaries(st.sampled_from([*PRESENT, *OTHERS]), st.floats(allow_nan=False)),
    st.sampled_from(["", "eval_"]),
)
def test_present_names_undo_old_names(metrics, prefix):
    metrics = {prefix + name: value for name, value in metrics.items()}
    both = with_old_names(metrics)
    assert with_present_names(both) == metrics and metrics.items() <= both.items()
    old_alone = {name: value for name, value in both.items() if name not in {prefix + each for each in PRESENT}}
    assert with_present_names(old_alone) == metrics


def test_the_value_of_the_present_name_counts():
    for entry in ({"value_loss": 1.0, "critic/loss": 2.0}, {"critic/loss": 2.0, "value_loss": 1.0}):
        assert with_present_names(entry) == {"critic/loss": 2.0}


def test_the_docs_name_the_release_without_old_names():
    """If this fails, the release is here: remove `with_old_names`, its uses and the sentences about them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert Version(project["version"]) < Version(OLD_NAMES_UNTIL)
    metrics, migration = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("metrics", "migration"))
    assert f"Until release {OLD_NAMES_UNTIL}" in metrics and f"Release {OLD_NAMES_UNTIL} removes" in migration
    assert f"until release {OLD_NAMES_UNTIL}" in read_log_history.__doc__
    section = migration.split("## Old names of metrics")[1]
    assert dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", section, re.MULTILINE)) == OLD_NAMES


@TEXT_FAMILY
def test_a_run_logs_each_metric_under_both_names(family, tmp_path):
    trainer = sapo_trainer(
        family,
        tmp_path,
        max_steps=2,
        num_mini_batches=1,
        critic_learning_rate=0.0625,
        critic_warmup_steps=1,
        critic_min_explained_variance=-math.inf,
        trainer_kwargs={
            "callbacks": [ValueDiagnostics(every=1, num_continuations=2, max_responses=2)],
            "eval_dataset": family.dataset(2),
        },
    )
    trainer.train()
    trainer.evaluate()
    first = trainer.state.log_history[0]
    assert {old: first[old] for old in OLD_NAMES} == {old: first[name] for old, name in OLD_NAMES.items()}
    assert first["critic/learning_rate"] == 0.0625 and first["critic/warmup"] == 1.0 and first["critic/loss"] > 0
    assert logged(trainer, "eval_critic/mean_value") == logged(trainer, "eval_value/mean")
    # Nothing but the old names is there twice.
    assert with_present_names(first).keys() == first.keys() - OLD_NAMES.keys()


@TEXT_FAMILY
def test_without_a_critic_there_is_no_metric_of_one(family, tmp_path):
    trainer = sapo_trainer(
        family,
        tmp_path,
        critic="none",
        advantage_estimator="leave_one_out",
        num_generations=2,
        trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert "returns/mean" in first and not {*OLD_NAMES, *PRESENT} & first.keys()


def test_measurements_of_an_older_checkpoint_go_on_under_both_names():
    trainer = SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _logs={},
        _tr_loss=torch.tensor(0.0),
        _total_loss_scalar=0.0,
    )
    pending = PendingLog(trainer, processes=None)
    metrics = {"value_loss": [0.5], "reward": [1.0]}
    pending.load_state({"log": {"metrics": metrics, "loss": torch.tensor(0.0), "last_logged": 0}})
    pending.on_train_begin(None, None, None)
    pending.add({"critic/loss": 0.25}, "train")
    assert trainer._metrics["train"] == {"value_loss": [0.5, 0.25], "critic/loss": [0.5, 0.25], "reward": [1.0]}


class TestReading:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """A log that began in an earlier release."""
        entries = [OLD_ENTRY, with_old_names(PRESENT_ENTRY)]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        return tmp_path

    def test_a_log_has_both_names(self, folder):
        log = read_log_history(folder)
        for old, present in (("value_loss", "critic/loss"), ("value/mean", "critic/mean_value")):
            expected = [OLD_ENTRY[old], PRESENT_ENTRY[present]]
            assert log[old].tolist() == log[present].tolist() == expected

    def test_the_viewer_has_each_metric_once(self, folder):
        log = read_recording(folder).log
        assert set(log) == set(PRESENT_ENTRY)
        assert log["critic/learning_rate"].tolist() == [1e-3, 1e-4]

    def test_a_study_reads_runs_of_an_earlier_release(self, tmp_path):
        lines = [json.dumps({**entry, "value_diagnostics/mae": 0.1}) for entry in (OLD_ENTRY, OLD_ENTRY)]
        (tmp_path / METRICS_NAME).write_text("\n".join(lines) + "\n")
        metrics = metrics_of(pd.Series({"folder": str(tmp_path), "completions": 8, "cpu_seconds": 2.0}))
        assert metrics["critic/loss"].tolist() == [0.25, 0.25]
        assert metrics["critic/diagnostics/mae"].tolist() == [0.1, 0.1] and not set(metrics) & OLD_NAMES.keys()

    @TEXT_FAMILY
    def test_the_model_card_of_a_run_that_an_earlier_release_began(self, family, tmp_path):
        args = sapo_trainer(family, tmp_path).args
        card = tmp_path / "README.md"
        card.write_text("---\nlibrary_name: transformers\n---\n## Quick start\n## Training procedure\n")
        complete_model_card(card, args, [OLD_ENTRY], "model", takes_images=False)
        assert "| `critic/loss` | 0.25 | 1 |" in card.read_text() and "value_loss`" not in card.read_text()


# ------------------------------------------------------------------------------------------- the package's own readers

# A file, a setting of verl or a function may have the same name: `critic_warmup.json`, `trainer.critic_warmup`.
OLD = re.compile(
    rf"(?<![\w/.])(?:eval_)?(?:{'|'.join(map(re.escape, OLD_NAMES))})(?![\w/.=(])|value_diagnostics/|value/\*"
)
TEXTS = (".md", ".ipynb", ".js", ".j2", ".yaml", ".txt")
# These two have the table of old names, and the changelog speaks of its own time.
WITH_OLD_NAMES = {"sapo_trl/metric_names.py", "docs/migration.md", "CHANGELOG.md"}


def strings_of(path: Path) -> list[str]:
    """The strings of a Python file, or the whole text of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [text]
    tree = ast.walk(ast.parse(text))
    return [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def old_names_in(path: Path) -> list[str]:
    return [name for text in strings_of(path) for name in OLD.findall(text)]


def test_nothing_reads_or_documents_an_old_name():
    folders = ("sapo_trl", "docs", "notebooks", "examples", "benchmarks", "trainer_configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", *TEXTS)]
    files = {path.relative_to(ROOT).as_posix(): path for path in [*files, *ROOT.glob("*.md")]}
    assert len(files) > 200 and WITH_OLD_NAMES < files.keys()
    found = {name: old_names_in(path) for name, path in files.items() if name not in WITH_OLD_NAMES}
    assert {name: names for name, names in found.items() if names} == {}


def test_old_names_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '`value_loss`, "eval_value/mean", `value_loss_aggregation`, `critic_warmup.json`, `value_diagnostics/*`'
    )
    assert old_names_in(page) == ["value_loss", "eval_value/mean", "value_diagnostics/"]
