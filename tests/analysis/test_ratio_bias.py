"""The geometric mean's bias: against loops, its bound, and as the trainer logs it."""

import math

import pytest
import torch
from hypothesis import given, settings

from sapo_trl import SAPOTrainer, Segments
from sapo_trl.analysis import segment_ratios
from sapo_trl.callbacks import RolloutCallback
from sapo_trl.losses import clipped_policy_loss, geometric_bias, soft_adaptive_policy_loss
from tests.strategies import noise, partitions, seeds, token_lists
from tests.testing_utils import length_reward, logged, never_logged, sapo_config


def slow_ratios(log_ratios: list[float]) -> dict[str, float]:
    n = len(log_ratios)
    ratios = [math.exp(x) for x in log_ratios]
    mean = sum(log_ratios) / n
    variance = sum((x - mean) ** 2 for x in log_ratios) / n
    geometric = math.prod(ratios) ** (1 / n)
    return {
        "geometric": geometric,
        "arithmetic": sum(ratios) / n,
        "product": math.prod(ratios),
        "bias": sum(ratios) / n - geometric,
        "bound": sum(max(geometric, r) * (x - mean) ** 2 for r, x in zip(ratios, log_ratios, strict=True)) / n / 2,
        "popular_bound": max(ratios) * variance / 2,
    }


class TestFunctions:
    @settings(max_examples=60, deadline=None)
    @given(partitions(), seeds)
    def test_equal_loops_and_the_bound_holds(self, segments, seed):
        log_ratio = noise(segments.ids, seed)
        dirty = torch.where(segments.mask, log_ratio, torch.nan)
        ours = segment_ratios(dirty, segments)
        for row, parts in enumerate(token_lists(segments)):
            for m, part in enumerate(parts):
                expected = slow_ratios([log_ratio[row, t].item() for t in part])
                for name in ("geometric", "arithmetic", "product", "bias", "bound"):
                    assert getattr(ours, name)[row, m].item() == pytest.approx(expected[name], abs=1e-10, rel=1e-9)
                assert 0 <= ours.bias[row, m] <= ours.bound[row, m] + 1e-14
                assert ours.bound[row, m] <= expected["popular_bound"] + 1e-12
                assert ours.exists[row, m]
        assert int(ours.exists.sum()) == int(segments.count.sum())
        assert (ours.bias[~ours.exists] == 0).all() and (ours.bound[~ours.exists] == 0).all()

    def test_small_ratios_in_float32(self):
        """Where the means differ in the seventh digit, a difference of float32 exponentials would be noise."""
        mask = torch.ones(1, 8, dtype=torch.bool)
        segments = Segments.from_last_tokens(~mask, mask)
        log_ratio = noise(mask, 0) * 1e-3
        exact, bound = geometric_bias(log_ratio, segments)
        single, _ = geometric_bias(log_ratio.float(), segments)
        assert exact.item() < 1e-6
        assert single.item() == pytest.approx(exact.item(), rel=0.05)
        assert bound.item() == pytest.approx(exact.item(), rel=0.01)

    def test_single_tokens_and_equal_ratios_have_none(self):
        segments = Segments(torch.tensor([[0, 1, 1, -1]]))
        bias, bound = geometric_bias(torch.tensor([[0.7, -0.3, -0.3, 5.0]]), segments)
        assert bias.tolist() == bound.tolist() == [[0.0, 0.0]]

    def test_no_tokens(self):
        bias, bound = geometric_bias(torch.zeros(2, 3), Segments(torch.full((2, 3), -1)))
        assert bias.shape == bound.shape == (2, 0)


class TestLosses:
    @pytest.mark.parametrize("loss", [clipped_policy_loss, soft_adaptive_policy_loss])
    def test_metrics_are_means_over_segments(self, loss):
        segments = Segments(torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, -1, 1]]))
        logps, old_logps = noise(segments.ids, 0, requires_grad=True), noise(segments.ids, 1)
        logps_dirty = torch.where(segments.mask, logps, torch.nan)
        metrics = loss(logps_dirty, old_logps, noise(segments.ids, 2), segments.mask, segments).metrics
        expected = [
            slow_ratios([(logps[row, t] - old_logps[row, t]).item() for t in part])
            for row, parts in enumerate(token_lists(segments))
            for part in parts
        ]
        for name, key in (("geometric_bias", "bias"), ("geometric_bias_bound", "bound")):
            assert metrics[name].item() == pytest.approx(sum(x[key] for x in expected) / 4, rel=1e-9)
            assert not metrics[name].requires_grad

    def test_only_of_geometric_means(self):
        segments = Segments(torch.tensor([[0, 0, 1]]))
        inputs = (*(noise(segments.ids, seed) for seed in range(3)), segments.mask)
        for arguments in ({}, {"segments": segments, "ratio_reduction": "sum"}):
            assert "geometric_bias" not in clipped_policy_loss(*inputs, **arguments).metrics


class Updates(RolloutCallback):
    """Keeps each micro-batch's log-ratios, and the tokens that share an importance ratio."""

    def __init__(self):
        self.kept = []

    def on_rollout(self, args, state, control, rollout, metrics):
        self.segment_ids = rollout.segments.ids

    def on_policy_forward(self, args, state, control, rows, log_ratios):
        ids = self.segment_ids[rows]
        if args.importance_sampling_level == "sequence":
            ids = torch.where(ids >= 0, 0, ids)
        self.kept.append((log_ratios.double(), Segments(ids)))


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
class TestInTheTrainer:
    def train(self, family, folder, updates=None, **overrides) -> SAPOTrainer:
        trainer = SAPOTrainer(
            model=family.build_model(),
            reward_funcs=length_reward,
            args=sapo_config(folder, **{"max_steps": 4, "learning_rate": 0.05, **overrides}),
            train_dataset=family.dataset(),
            processing_class=family.processing_class,
            callbacks=[updates] if updates else None,
        )
        trainer.train()
        return trainer

    @pytest.mark.parametrize("level", ["segment", "sequence"])
    def test_logged_means_equal_loops_over_the_updates(self, family, tmp_path, level):
        # Two micro-batches of unequal numbers of segments a step.
        settings = {"importance_sampling_level": level, "gradient_accumulation_steps": 2}
        trainer = self.train(family, tmp_path, updates := Updates(), **settings)
        for name, key in (("ratio/geometric_bias", "bias"), ("ratio/geometric_bias_bound", "bound")):
            values = logged(trainer, name)
            assert len(values) == 4 and len(updates.kept) == 8
            for step, value in enumerate(values):
                expected = [
                    slow_ratios([log_ratio[row, t].item() for t in part])[key]
                    for log_ratio, segments in updates.kept[2 * step : 2 * step + 2]
                    for row, parts in enumerate(token_lists(segments))
                    for part in parts
                ]
                assert value == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-7), (name, step)
            assert values[0] == pytest.approx(0, abs=1e-7)  # the policy has not moved yet
        assert logged(trainer, "ratio/geometric_bias")[1] > 1e-4

    def test_absent_without_a_segment_ratio(self, family, tmp_path):
        trainer = self.train(family, tmp_path, max_steps=2, importance_sampling_level="token")
        assert logged(trainer, "ratio/mean") and never_logged(trainer, "ratio/geometric_bias")
