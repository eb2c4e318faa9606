"""A critic beside Monte-Carlo values: the comparison itself, and in the trainer."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_trl import ValueDiagnostics
from sapo_trl.callbacks.diagnostics import value_agreement
from tests.testing_utils import fixed_rollout, logged, random_completions, sapo_trainer


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 9)), min_size=3, max_size=20)


def slow_correlation(xs: list[float], ys: list[float]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return covariance / spread if spread else math.nan


def slow_ranks(xs: list[float]) -> list[float]:
    """One plus the number of smaller values, plus half of the number of other equal ones."""
    return [1 + sum(x < y for x in xs) + (sum(x == y for x in xs) - 1) / 2 for y in xs]


class TestAgreement:
    @settings(max_examples=50)
    @given(numbers)
    def test_equals_the_definitions(self, pairs):
        values, truth = ([float(x) for x in column] for column in zip(*pairs, strict=True))
        result = value_agreement(pd.Series(values), pd.Series(truth))
        n = len(pairs)
        assert result["mae"] == pytest.approx(sum(abs(v - t) for v, t in zip(values, truth, strict=True)) / n)
        expected = slow_correlation(slow_ranks(values), slow_ranks(truth))
        assert result["rank_correlation"] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        residuals = [t - v for v, t in zip(values, truth, strict=True)]

        def spread(xs):
            return sum((x - sum(xs) / n) ** 2 for x in xs)

        explained = 1 - spread(residuals) / spread(truth) if spread(truth) else math.nan
        assert result["explained_variance"] == pytest.approx(explained, abs=1e-9, nan_ok=True)

    def test_a_perfect_and_a_shifted_critic(self):
        truth = pd.Series([0.1, 0.5, 0.9])
        perfect = value_agreement(truth, truth)
        assert (perfect["mae"], perfect["explained_variance"]) == (0.0, 1.0)
        assert perfect["rank_correlation"] == pytest.approx(1.0)
        shifted = value_agreement(truth + 0.3, truth)
        assert shifted["mae"] == pytest.approx(0.3) and shifted["explained_variance"] == pytest.approx(1.0)


class TestInTheTrainer:
    @pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)], indirect=True)
    def test_states_and_files(self, family, tmp_path):
        """With a reward that the response's first token decides, all later states have values without error."""

        def first_token_reward(completion_ids, **kwargs):
            return [float(ids[0] % 2) for ids in completion_ids]

        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=4,
            segmentation="token",
            trainer_kwargs={
                "reward_funcs": first_token_reward,
                "callbacks": [
                    ValueDiagnostics(every=2, num_continuations=16, max_responses=3, output_dir=tmp_path / "values")
                ],
            },
        )
        trainer.train()
        (path,) = (tmp_path / "values").glob("*.parquet")  # the first of two rollouts
        table = pd.read_parquet(path)
        assert set(table["response"]) == {0, 1, 2}
        later = table[table["token"] > 0]
        assert (later["monte_carlo_value"] == later["reward"]).all() and (later["standard_error"] == 0).all()
        first = table[table["token"] == 0]
        assert (first["standard_error"] > 0).all()
        assert len(logged(trainer, "critic/diagnostics/mae")) == 1
        agreement = value_agreement(table["value"], table["monte_carlo_value"])
        for name, value in agreement.items():
            assert logged(trainer, f"critic/diagnostics/{name}") == [pytest.approx(value, abs=1e-5)], name

    @TEXT_FAMILY
    def test_it_needs_the_trainers_own_generation(self, family, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            trainer_kwargs={
                "rollout_func": fixed_rollout(random_completions()),
                "callbacks": [ValueDiagnostics()],
            },
        )
        with pytest.raises(ValueError, match="continues responses from their tokens alone"):
            trainer.train()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"every": 0}, "`every` must be at least 1"),
            ({"num_continuations": 1}, "must be at least 2 for a standard"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ValueDiagnostics(**arguments)

    @TEXT_FAMILY
    def test_training_goes_on_as_without_it(self, family, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=4,
            trainer_kwargs={"callbacks": [ValueDiagnostics(every=1, num_continuations=2)]},
        )
        trainer.train()
        plain = sapo_trainer(family, tmp_path, max_steps=4)
        plain.train()
        for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(one, other)
