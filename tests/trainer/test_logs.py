"""The table of completions and the other logs."""

import json
import math

import pandas as pd
import pytest

from sapo_trl.foreign_text import visible
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)


def completions_tables(family, tmp_path, **trainer_kwargs):
    """The rollouts of a short training, each with the table that was logged of it."""
    recorder = Recorder()
    trainer_kwargs["callbacks"] = [recorder]
    settings = {"max_steps": 4, "log_completions": True, "num_completions_to_print": 1}
    sapo_trainer(family, tmp_path, **settings, trainer_kwargs=trainer_kwargs).train()
    tables = [pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet") for step in (1, 3)]
    return zip(recorder.rollouts, tables, strict=True)


class TestLogs:
    @BOTH_FAMILIES
    def test_completions_table_has_the_mean_token_advantage(self, family, tmp_path):
        for rollout, table in completions_tables(family, tmp_path, rollout_func=fixed_rollout(random_completions(5))):
            expected = [
                (row.sum() / mask.sum()).item()
                for row, mask in zip(rollout.advantages, rollout.segments.mask, strict=True)
            ]
            assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-6)
            assert table["length_reward"].tolist() == pytest.approx(rollout.rewards.tolist())
            assert max(map(abs, expected)) > 0.1  # GRPO's would be 0 with one generation per prompt

    @TEXT_FAMILY
    def test_completions_table_has_the_segments(self, family, tmp_path):
        tables = completions_tables(
            family,
            tmp_path,
            # The first response has no reward, the others a token that a tool wrote.
            reward_funcs=lambda completions, **kwargs: [None, 0.0, 1.0, 0.5],
            rollout_func=fixed_rollout(
                random_completions(5, min_length=4),
                env_mask=lambda prompts, completions: [[1, 0] + [1] * (len(row) - 2) for row in completions],
            ),
        )
        decode = family.tokenizer.decode
        for rollout, table in tables:
            assert table["segments/text"][0] == "" and len(table["segments/advantages"][0]) == 0
            for row in range(1, 4):
                pieces, means = {}, {}
                for token, segment, advantage in zip(
                    rollout.completion_ids[row].tolist(),
                    rollout.segments.ids[row].tolist(),
                    rollout.advantages[row].tolist(),
                    strict=True,
                ):
                    if segment >= 0:
                        pieces.setdefault(segment, []).append(token)
                        means.setdefault(segment, []).append(advantage)
                assert len(pieces) > 1
                assert table["segments/text"][row] == "│".join(visible(decode(ids)) for ids in pieces.values())
                expected = [sum(values) / len(values) for values in means.values()]
                assert table["segments/advantages"][row] == pytest.approx(expected, abs=1e-4)

    @TEXT_FAMILY
    def test_completions_table_after_a_smaller_evaluation_batch(self, family, tmp_path):
        """TRL's table keeps as many rows as a rollout has: the older ones keep their advantages."""
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            log_completions=True,
            num_completions_to_print=1,
            per_device_eval_batch_size=2,
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(random_completions(5)),
                "eval_dataset": family.dataset(2),
            },
        )
        trainer.train()
        trainer.evaluate()
        training, evaluation = (
            (rollout.advantages.sum(1) / rollout.segments.mask.sum(1)).tolist() for rollout in recorder.rollouts
        )
        table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
        assert table["advantage"].tolist() == pytest.approx(training[2:] + evaluation, abs=1e-6)

    @TEXT_FAMILY
    def test_every_metric_is_there(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.1)
        trainer.train()
        first = trainer.state.log_history[0]
        names = """reward completions/mean_length entropy policy_loss clip_ratio/low_mean clip_ratio/high_mean
            clip_ratio/dual_mean approx_kl critic/loss critic/explained_variance grad_norm critic/grad_norm kl
            segments/count segments/length segments/max_length segments/single_token_share segments/entropy_at_cuts
            segments/entropy_elsewhere segments/value_change_at_cuts segments/value_change_elsewhere
            time/generate time/score time/value time/reward time/update critic/learning_rate"""
        assert not [name for name in names.split() if not math.isfinite(first[name])]
        assert all(first[name] > 0 for name in first if name.startswith("time/"))
        assert first["loss"] == pytest.approx(first["policy_loss"], abs=1e-6)

    @TEXT_FAMILY
    def test_logged_means_over_several_steps(self, family, tmp_path):
        runs = {}
        for every in (1, 2):
            trainer = sapo_trainer(
                family,
                tmp_path,
                max_steps=4,
                logging_steps=every,
                trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
            )
            trainer.train()
            runs[every] = trainer
        for name in ("policy_loss", "critic/loss", "critic/grad_norm", "entropy"):
            one = logged(runs[1], name)
            means = [(one[0] + one[1]) / 2, (one[2] + one[3]) / 2]
            assert logged(runs[2], name) == pytest.approx(means, abs=1e-6), name

    @TEXT_FAMILY
    def test_log_metrics_of_training_scripts_is_transformers_own(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        trainer.log_metrics("train", {"train_loss": 0.5})
        trainer.save_metrics("train", {"train_loss": 0.5})
        assert json.loads((tmp_path / "train_results.json").read_text()) == {"train_loss": 0.5}

    @TEXT_FAMILY
    def test_a_checkpoint_comes_with_the_model_card(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, save_strategy="steps", save_steps=2)
        trainer.train()
        card = (tmp_path / "README.md").read_text()
        assert "2605.01327" in card and "Segment-Aligned Policy Optimization" in card
        assert "- sapo" in card and "- trl" in card
        citations = card[card.index("## Citations") :]
        assert "gao2026segment" in citations and "2511.20347" not in citations  # Qwen's SAPO is another one
        assert "| `critic/loss` |" in card
