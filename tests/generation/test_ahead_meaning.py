"""What training on responses that are one rollout old means: by hand, and in a run."""

import math

import pytest
import torch
from transformers import TrainerCallback

from sapo_trl.generation import VLLMServerRollout
from sapo_trl.losses import clipped_policy_loss, masked_policy_loss
from sapo_trl.sampler_correction import importance_correction
from tests.testing_utils import Recorder, logged, sapo_trainer
from tests.vllm.stub import stub_server


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


class TestByHand:
    """
    One response of three tokens with advantages 1, 1 and -1. Probabilities under the three policies, and what follows:

    | | token 1 | token 2 | token 3 |
    | --- | --- | --- | --- |
    | sampled it | 1/2 | 1/4 | 1/8 |
    | scored it | 1/4 | 1/2 | 1/2 |
    | is updated | 1/2 | 1/2 | 1/4 |
    | correction: scored / sampled | 1/2 | 2 | 4, cut to 3 |
    | ratio: updated / scored | 2 | 1 | 1/2 |

    The ratio updated / sampled would be 1, 2 and 2: other tokens would be clipped.
    """

    sampled, scored = logs(1 / 2, 1 / 4, 1 / 8), logs(1 / 4, 1 / 2, 1 / 2)
    advantages = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)

    def updated(self):
        return logs(1 / 2, 1 / 2, 1 / 4).requires_grad_()

    def correction(self):
        weights = importance_correction(self.scored, self.sampled, self.mask, "token_truncate", clip_max=3.0)
        assert weights.tolist() == [pytest.approx([0.5, 2.0, 3.0])]
        return weights

    def test_the_clip(self):
        """Token 1: 1/2 min(2, 1.28); token 2: 2 · 1; token 3: the clip's 0.8 is worse than 1/2, so 3 · -0.8."""
        logps = self.updated()
        output = clipped_policy_loss(
            logps, self.scored, self.advantages, self.mask, clip_low=0.2, clip_high=0.28, weights=self.correction()
        )
        assert output.loss.item() == pytest.approx(-(0.5 * 1.28 + 2.0 * 1.0 + 3.0 * -0.8) / 3)
        output.loss.backward()
        # Tokens 1 and 3 are clipped. Token 2's gradient is -(correction · ratio · advantage) / 3.
        assert logps.grad.tolist() == [pytest.approx([0.0, -2.0 / 3, 0.0])]

    def test_the_double_sided_mask(self):
        """Tokens 1 and 3 lie outside of [0.8, 1.28]: dropped, although the sampler's ratio 1 of token 1 is inside."""
        logps = self.updated()
        output = masked_policy_loss(
            logps, self.scored, self.advantages, self.mask, low=0.2, high=0.28, weights=self.correction()
        )
        assert output.loss.item() == pytest.approx(-2.0 / 3)
        output.loss.backward()
        assert logps.grad.tolist() == [pytest.approx([0.0, -2.0 / 3, 0.0])]

    def test_whole_responses(self):
        """1/2 · 2 · 4 = 4: cut to 3, or dropped."""
        for mode, expected in (("sequence_truncate", 3.0), ("sequence_mask", 0.0)):
            found = importance_correction(self.scored, self.sampled, self.mask, mode, clip_max=3.0)
            assert found.tolist() == [[pytest.approx(expected)]]

    def test_without_an_update_between_there_is_nothing_to_correct(self):
        assert importance_correction(self.scored, self.scored, self.mask, "token_truncate").tolist() == [[1.0] * 3]


class Weights(TrainerCallback):
    def __init__(self):
        self.states = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


LOSSES = {
    "segment_clip": {"advantage_estimator": "batch"},
    "grpo": {"advantage_estimator": "group", "loss_type": "grpo", "importance_sampling_level": "token"},
}


@TEXT_FAMILY
class TestInARun:
    def run(self, family, folder, **settings):
        """A run, the batches that its losses got, and the weights after each step."""
        weights, recorder, batches = Weights(), Recorder(), []
        with stub_server(family.build_model(seed=1).eval()) as server:
            trainer = sapo_trainer(
                family,
                folder,
                trainer_kwargs={
                    "rollout_func": VLLMServerRollout(server.url, folder / "weights"),
                    "callbacks": [weights, recorder],
                },
                **{
                    "rollouts_ahead": 1,
                    "vllm_importance_sampling_mode": "token_truncate",
                    "max_steps": 6,
                    "num_generations": 2,
                    "critic": "none",
                    "beta": 0.0,
                    "whiten_advantages": False,
                    "avoid_padding": False,
                    "learning_rate": 0.02,
                    **settings,
                },
            )
            policy_loss = trainer.policy_loss

            def keep(model, batch):
                batches.append((trainer.state.global_step, batch))
                return policy_loss(model, batch)

            trainer.policy_loss = keep
            trainer.train()
        return trainer, recorder, batches, weights.states

    def logps(self, family, weights, batch):
        """Of each row alone, without padding."""
        model, rows = family.build_model(), torch.zeros(batch["completion_ids"].shape)
        model.load_state_dict(weights)
        for row, (prompt, seen, ids, kept) in enumerate(
            zip(
                batch["prompt_ids"],
                batch["prompt_mask"],
                batch["completion_ids"],
                batch["completion_mask"],
                strict=True,
            )
        ):
            prompt, ids = prompt[seen.bool()], ids[kept.bool()]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
            rows[row, : len(ids)] = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        return rows

    @pytest.mark.parametrize("loss", list(LOSSES))
    def test_each_quantity_is_of_its_policy(self, family, loss, tmp_path):
        trainer, recorder, batches, states = self.run(family, tmp_path, **LOSSES[loss])
        assert [step for step, _ in batches] == [0, 1, 2, 3, 4, 5]
        assert logged(trainer, "sampling/age") == [0, 1, 1]
        moved = []
        for step, batch in batches:
            scored_at, sampled_at = step // 2 * 2, max(step // 2 * 2 - 2, 0)
            tokens = batch["completion_mask"].bool()
            scored, sampled = (self.logps(family, states[at], batch) for at in (scored_at, sampled_at))
            torch.testing.assert_close(batch["old_per_token_logps"][tokens], scored[tokens], rtol=0, atol=1e-4)
            torch.testing.assert_close(batch["sampling_per_token_logps"][tokens], sampled[tokens], rtol=0, atol=1e-4)
            correction = (scored - sampled).exp().clamp(max=3.0)
            moved.append((correction[tokens] - 1).abs().max().item())
            rewards = batch["rewards"]
            if loss == "segment_clip":
                found = batch["importance_sampling_ratio"]
                torch.testing.assert_close(found[tokens], correction[tokens], rtol=1e-3, atol=1e-4)
            else:
                assert "importance_sampling_ratio" not in batch
                of_rollout = recorder.rollouts[step // 2].rewards.view(-1, 2)
                mean, std = of_rollout.mean(1, keepdim=True), of_rollout.std(1, keepdim=True)
                group = ((of_rollout - mean) / (std + 1e-4)).flatten()[batch["rollout_rows"]]
                expected = (group[:, None] * correction)[tokens]
                torch.testing.assert_close(batch["advantages"][tokens], expected, rtol=1e-3, atol=1e-4)
                assert rewards.tolist() == recorder.rollouts[step // 2].rewards[batch["rollout_rows"]].tolist()
        assert max(moved[:2]) < 1e-3 and min(moved[2:]) > 0.05  # nothing at age 0, much at age 1

    def test_while_only_the_critic_learns_the_sampler_is_the_policy(self, family, tmp_path):
        settings = {"critic": "shared", "critic_warmup_steps": 4, "max_steps": 6, "beta": 0.0}
        trainer, _, batches, _ = self.run(family, tmp_path, advantage_estimator="gae", **settings)
        assert logged(trainer, "sampling/age") == [0, 1, 1]
        for _, batch in batches:  # also the last rollout, which was sampled before the policy moved
            ratio = batch["importance_sampling_ratio"][batch["completion_mask"].bool()]
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-3)

    def test_the_sampler_is_compared_at_age_0_alone(self, family, tmp_path):
        """At age 1 the difference is far above the limit, and no error."""
        trainer, *_ = self.run(
            family, tmp_path, learning_rate=0.1, max_sampler_logp_difference=1e-3, **LOSSES["segment_clip"]
        )
        first, *others = logged(trainer, "sampling/sampling_logp_difference/mean")
        assert first < 1e-4 and min(others) > 1e-2
        assert math.isfinite(max(others))
