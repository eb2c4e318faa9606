"""Responses from another engine: the correction, the check of the first rollout, what the engine is sent and reads."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration

from sapo_trl.sampler_correction import MODES, importance_correction, logp_difference
from sapo_trl.trainer.trl.generation import TRL_EXPANDS_PLACEHOLDERS_TWICE, collapsed
from tests.testing_utils import Recorder, fixed_rollout, logged, random_completions, sapo_trainer, state_of


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
numbers = st.floats(-3, 0) | st.just(math.nan)


class TestCorrection:
    @settings(max_examples=100)
    @given(
        st.lists(st.lists(st.tuples(st.floats(-3, 0), numbers, st.booleans()), min_size=3, max_size=3), max_size=3),
        st.sampled_from(MODES),
        st.sampled_from([(None, 3.0), (0.5, 2.0), (0.5, None), (None, None)]),
    )
    def test_equals_the_definition(self, rows, mode, bounds):
        low, high = bounds
        logps, sampling, mask = (
            torch.tensor([[cell[i] for cell in row] for row in rows], dtype=dtype).view(len(rows), 3)
            for i, dtype in ((0, torch.float64), (1, torch.float64), (2, torch.bool))
        )
        found = importance_correction(logps, sampling, mask, mode, low, high)
        for r, row in enumerate(rows):
            differences = [a - b if keep and not math.isnan(b) else 0.0 for a, b, keep in row]
            groups = [sum(differences)] if mode.startswith("sequence") else differences
            expected = []
            for difference in groups:
                ratio = math.exp(difference)
                below, above = low is not None and ratio < low, high is not None and ratio > high
                if mode.endswith("truncate"):
                    ratio = low if below else high if above else ratio
                else:
                    ratio = 0.0 if below or above else ratio
                expected.append(ratio)
            assert found[r].tolist() == pytest.approx(expected, abs=1e-12)
        total, count = logp_difference(logps, sampling, mask)
        known = [abs(a - b) for row in rows for a, b, keep in row if keep and not math.isnan(b)]
        assert (total.item(), count.item()) == (pytest.approx(sum(known)), len(known))

    def test_unknown_mode(self):
        zeros = torch.zeros(1, 1)
        with pytest.raises(ValueError, match="`mode` must be one of"):
            importance_correction(zeros, zeros, zeros.bool(), "token")


def rollout_with_logps(shift: float):
    """A sampler whose log-probabilities are the policy's plus `shift`."""
    base = fixed_rollout(random_completions())

    def rollout(prompts, trainer):
        output = base(prompts, trainer)
        output["logprobs"] = []
        for prompt, completion in zip(output["prompt_ids"], output["completion_ids"], strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logps = trainer.accelerator.unwrap_model(trainer.model)(input_ids=ids).logits.log_softmax(-1)
            taken = logps[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)[-len(completion) :]
            output["logprobs"].append((taken + shift).tolist())
        return output

    return rollout


class TestInTheTrainer:
    def run(self, family, output_dir, shift, **settings):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            output_dir,
            trainer_kwargs={"rollout_func": rollout_with_logps(shift), "callbacks": [recorder]},
            **{"vllm_importance_sampling_mode": "token_truncate", "max_steps": 2, "beta": 0.0, **settings},
        )
        before = state_of(trainer.model)
        trainer.train()
        return trainer, before

    @TEXT_FAMILY
    def test_the_same_model_needs_no_correction(self, family, tmp_path):
        # Not Adam, which makes steps of rounding errors.
        corrected, _ = self.run(family, tmp_path, 0.0, optim="sgd")
        plain, _ = self.run(family, tmp_path, 0.0, optim="sgd", vllm_importance_sampling_correction=False)
        assert logged(corrected, "sampling/sampling_logp_difference/mean") == [pytest.approx(0.0, abs=1e-5)]
        for one, other in zip(corrected.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    @TEXT_FAMILY
    @pytest.mark.parametrize(
        "loss",
        [
            {"critic": "none", "advantage_estimator": "batch"},
            {
                "critic": "none",
                "advantage_estimator": "group",
                "num_generations": 2,
                "loss_type": "grpo",
                "importance_sampling_level": "token",
            },
        ],
        ids=["segment_clip", "grpo"],
    )
    def test_token_losses_are_multiplied_by_the_ratio(self, family, loss, tmp_path):
        """One plain gradient step: a sampler that is off by log 2 everywhere doubles or halves it."""
        steps = []
        for shift in (0.0, math.log(2), -math.log(2)):
            trainer, before = self.run(
                family,
                tmp_path,
                shift,
                **loss,
                optim="sgd",
                max_steps=1,
                num_mini_batches=1,
                max_grad_norm=1e9,
                max_sampler_logp_difference=None,
            )
            steps.append(torch.cat([(t - before[n]).flatten() for n, t in state_of(trainer.model).items()]))
        assert steps[0].abs().max() > 1e-3
        torch.testing.assert_close(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(steps[2], steps[0] * 2, rtol=1e-3, atol=1e-5)

    @TEXT_FAMILY
    def test_a_sampler_that_is_off_stops_the_run(self, family, tmp_path):
        message = r"by 0.3000 on average, more than max_sampler_logp_difference=0.05.*placeholders expanded twice"
        with pytest.raises(ValueError, match=message):
            self.run(family, tmp_path, 0.3)
        trainer, _ = self.run(family, tmp_path, 0.3, max_sampler_logp_difference=None)
        assert logged(trainer, "sampling/sampling_logp_difference/mean") == [pytest.approx(0.3, abs=1e-4)]


class TestWhatTheSamplerReads:
    def test_runs_are_collapsed(self):
        assert collapsed([7, 7, 1, 7, 7, 7, 2, 7], 7) == [7, 1, 7, 2, 7]
        assert collapsed([1, 1], 7) == [1, 1] and collapsed([], 7) == []

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
    def test_a_colocated_vllm_answers_the_prompt_that_is_trained_on(self, family, tmp_path):
        """vLLM puts as many placeholders as an image has features in the place of each: see its prompts afterwards."""
        assert TRL_EXPANDS_PLACEHOLDERS_TWICE, "TRL has its own fix: this one can go"
        trainer = sapo_trainer(family, tmp_path)
        pad = trainer.processing_class.image_token_id
        features = 4
        seen = []

        def generate(prompts, images, num_generations, profiler):
            for ids, row in zip(prompts, images, strict=True):
                assert row is None or ids.count(pad) == len(row)
                seen.append([copy for token in ids for copy in ([token] * features if token == pad else [token])])
            return None, [[30, trainer.eos_token_ids[0]] for _ in prompts], [[[0.0], [0.0]] for _ in prompts], None

        trainer.use_vllm, trainer.vllm_mode = True, "colocate"
        trainer._last_loaded_step = -1  # TRL makes it with a real vLLM
        trainer.vllm_generation = SimpleNamespace(
            generate=generate, sync_weights=lambda: None, max_completion_length=trainer.max_completion_length
        )
        rows = list(trainer.train_dataset.select(range(2)))
        prompts = trainer.tokenized_prompts(rows)
        trainer.continuations.generate(prompts, 4)
        assert seen == prompts.ids
        trainer.vllm_mode = "server"  # which wants the expanded ones
        seen.clear()
        features = 1
        trainer.vllm_generation.generate = lambda prompts, images, num_generations, profiler: (
            seen.extend(prompts),
            [[30]] * len(prompts),
            [[[0.0]]] * len(prompts),
            None,
        )
        trainer.continuations.generate(prompts, 4)
        assert seen == prompts.ids


class TestWhatTheSamplerIsSent:
    @pytest.mark.parametrize(
        ("family", "critic"),
        [
            ("qwen2", "separate"),
            ("qwen2", "shared"),
            ("qwen2", "adapter"),
            pytest.param("qwen2_5_vl", "separate", marks=pytest.mark.slow),
            ("qwen2_5_vl", "shared"),
            pytest.param("qwen2_5_vl", "adapter", marks=pytest.mark.slow),
        ],
        indirect=["family"],
    )
    @pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
    def test_the_policy_and_nothing_else(self, family, critic, modules_to_save, tmp_path):
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules_to_save)
        with_adapter = critic == "adapter" or modules_to_save is not None
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            trainer_kwargs={
                "peft_config": lora if with_adapter else None,
                "rollout_func": fixed_rollout(random_completions()),
            },
        )
        trainer.train()
        generation = VLLMGeneration.__new__(VLLMGeneration)
        generation.model = trainer.accelerator.unwrap_model(trainer.model)
        generation.accelerator = trainer.accelerator
        generation._dist = trainer._dist
        sent = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
        expected = family.build_model()
        assert sent.keys() == {name for name, _ in expected.named_parameters()}
        if with_adapter:
            assert trainer.accelerator.unwrap_model(trainer.model).active_adapter == "default"
