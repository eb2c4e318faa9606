"""Noise of the gradient: on a toy whose covariance is known, and in a real run against its recorded gradients."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from sapo_trl.analysis import GradientNoise, GradientVariance
from sapo_trl.analysis.gradient_variance import read_results
from tests.testing_utils import Recorder, sapo_config, sapo_trainer, state_of, unmoved


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
FROZEN = {"learning_rate": 0.0, "critic_learning_rate": 0.0, "max_grad_norm": 0.0}


def measured(gradients: np.ndarray, num_blocks: int = 8) -> GradientNoise:
    """Through autograd: the gradient of `w . x` is `x`, here split over two parameters."""
    noise = GradientVariance(num_blocks=num_blocks)
    width = gradients.shape[1] // 2
    one, two = (torch.zeros(size, requires_grad=True) for size in (width, gradients.shape[1] - width))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two]}], lr=0.0)
    for step, gradient in enumerate(gradients):
        optimizer.zero_grad()
        x = torch.tensor(gradient, dtype=torch.float32)
        (one @ x[:width] + two @ x[width:]).backward()
        noise.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
    return noise.result()


class TestToy:
    def test_equals_numpy(self):
        gradients = np.random.default_rng(0).normal(0.5, 2.0, size=(30, 5)).astype(np.float32).astype(np.float64)
        result = measured(gradients)
        n = len(gradients)
        trace = np.trace(np.cov(gradients.T))
        products = gradients @ gradients.T
        signal = (products.sum() - np.trace(products)) / (n * (n - 1))  # the mean over pairs of different steps
        assert (result.steps, result.parameters) == (30, 5)
        assert result.trace == pytest.approx(trace, rel=1e-9)
        assert result.squared_mean == pytest.approx(signal, rel=1e-9)
        assert result.noise_to_signal == pytest.approx(trace / signal, rel=1e-9)

    def test_known_covariance_unbiased_and_with_honest_errors(self):
        generator = np.random.default_rng(1)
        mean = np.array([1.0, -0.5, 0.0, 0.2])
        factor = generator.normal(size=(4, 4))
        covariance = factor @ factor.T
        results = [measured(generator.multivariate_normal(mean, covariance, size=32)) for _ in range(100)]
        for name, truth in (("trace", np.trace(covariance)), ("squared_mean", mean @ mean)):
            values = np.array([getattr(result, name) for result in results])
            errors = np.array([getattr(result, f"{name}_error") for result in results])
            assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(len(values))), name
            assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.25), name

    def test_more_noise_than_signal(self):
        """The squared norm of the mean may come out negative: then no ratio is claimed."""
        result = measured(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        assert result.squared_mean == pytest.approx(-1 / 3) and np.isnan(result.noise_to_signal)
        assert result.trace == pytest.approx(4 / 3)

    def test_one_block_has_no_errors(self):
        result = measured(np.random.default_rng(0).normal(size=(10, 3)), num_blocks=1)
        assert np.isnan(result.trace_error) and result.trace > 0

    def test_errors(self):
        with pytest.raises(ValueError, match="`num_blocks` must be at least 1, got 0"):
            GradientVariance(num_blocks=0)
        with pytest.raises(ValueError, match="at least 2 steps with a gradient, got 0"):
            GradientVariance().result()


class GradientRecorder(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy())


class TestInTheTrainer:
    @TEXT_FAMILY
    @pytest.mark.parametrize("level", ["token", "segment", "sequence"])
    def test_equals_the_recorded_gradients(self, family, tmp_path, level):
        noise, recorder, rollouts = (
            GradientVariance(tmp_path / "noise.json", num_blocks=2),
            GradientRecorder(),
            Recorder(),
        )
        trainer = sapo_trainer(
            family,
            tmp_path,
            **FROZEN,
            max_steps=6,
            num_mini_batches=2,
            importance_sampling_level=level,
            trainer_kwargs={"callbacks": [noise, recorder, rollouts]},
        )
        before = state_of(trainer.model)
        trainer.train()
        assert len(unmoved(before, trainer.model)) == len(before)
        gradients = np.stack(recorder.gradients)
        assert len(gradients) == 6 and len(rollouts.rollouts) == 3 and (gradients.std(axis=0) > 0).any()
        result = noise.result()
        assert result.trace == pytest.approx(gradients.var(axis=0, ddof=1).sum(), rel=1e-6)
        products = gradients @ gradients.T
        signal = (products.sum() - np.trace(products)) / 30
        assert result.squared_mean == pytest.approx(signal, rel=1e-6)
        # Two blocks: rollouts 0 and 2 (four steps), and 1.
        blocks = [gradients[[2, 3]], gradients[[0, 1, 4, 5]]]
        traces = [block.var(axis=0, ddof=1).sum() for block in blocks]
        assert result.trace_error == pytest.approx(abs(traces[0] - traces[1]) / 2, rel=1e-6)
        assert result.parameters == gradients.shape[1]
        written = read_results({level: tmp_path / "noise.json"})[level]
        assert written == result or np.isnan(result.noise_to_signal)

    @TEXT_FAMILY
    def test_what_tells_granularities_apart(self, family, tmp_path):
        """At ratio 1 the ratio's level is the same for tokens and segments; the partition's is not."""

        def traces(**overrides):
            noise = GradientVariance()
            settings = {**FROZEN, "max_steps": 4, "trainer_kwargs": {"callbacks": [noise]}, **overrides}
            sapo_trainer(family, tmp_path, **settings).train()
            return noise.result().trace

        segment = traces()
        assert traces(importance_sampling_level="token") == pytest.approx(segment, rel=1e-4)
        for other in (
            {"importance_sampling_level": "sequence"},
            {"segmentation": "token", "importance_sampling_level": "token"},
            {"segmentation": "sequence"},
        ):
            assert abs(traces(**other) / segment - 1) > 0.01, other

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"learning_rate": 1e-6}, "set `learning_rate=0`, got 1e-06"),
            ({"max_grad_norm": 1.0}, "set `max_grad_norm=0`, got 1.0"),
            ({"num_iterations": 2}, "set `num_iterations=1`, got 2"),
        ],
    )
    def test_runs_that_are_not_frozen_are_refused(self, overrides, message, tmp_path):
        args = sapo_config(tmp_path, **{**FROZEN, **overrides})
        with pytest.raises(ValueError, match=message):
            GradientVariance().on_train_begin(args, None, None)

    def test_a_moving_critic_is_mentioned(self, tmp_path, caplog):
        args = sapo_config(tmp_path, **{**FROZEN, "critic_learning_rate": 0.1})
        GradientVariance().on_train_begin(args, None, None)
        assert "`critic_learning_rate` is 0.1" in caplog.text

    def test_steps_without_gradients_do_not_count(self):
        noise = GradientVariance()
        parameter = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        noise.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, optimizer=optimizer)
        with pytest.raises(ValueError, match="got 0"):
            noise.result()

    def test_files_that_are_none_of_ours(self, tmp_path):
        (tmp_path / "other.json").write_text(json.dumps({"steps": 3}))
        with pytest.raises(ValueError, match="other.json: `parameters` is missing"):
            read_results({"a": tmp_path / "other.json"})
        with pytest.raises(ValueError, match="nothing.json: there is no such file"):
            read_results({"a": tmp_path / "nothing.json"})
