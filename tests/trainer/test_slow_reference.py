"""
A run's advantages, returns, losses and metrics against plain Python: from the token ids of a rollout and the weights
that were there, by transformers' plain forward of one response at a time and loops over its tokens.
"""

import math

import pytest
import torch

from tests.testing_utils import (
    Recorder,
    WeightRecorder,
    fixed_rollout,
    length_reward,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
)


BETA, GAMMA, LAM, TEMPERATURE, TOP_PERCENT = 0.3, 0.9, 0.8, 0.8, 30.0
CLAMP, EPSILON, EPSILON_HIGH, DELTA, CLIPRANGE_VALUE = 1.0, 0.1, 0.15, 1.2, 0.05


def token_statistics(model, prompt: list[int], completion: list[int]) -> tuple[list[float], list[float]]:
    """Log-probability and entropy of each completion token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / TEMPERATURE
    logps, entropies = [], []
    for t, token in enumerate(completion):
        distribution = torch.softmax(logits[len(prompt) + t - 1], dim=-1).tolist()
        logps.append(math.log(distribution[token]))
        entropies.append(-sum(p * math.log(p) for p in distribution))
    return logps, entropies


def state_values(weights: dict[str, torch.Tensor], backbone, prompt: list[int], completion: list[int]) -> list[float]:
    """Value of the state before each completion token."""
    with torch.no_grad():
        hidden = backbone(torch.tensor([prompt + completion])).last_hidden_state[0].double()
    w, b = weights["head.weight"][0].double(), weights["head.bias"][0].double()
    return [(hidden[len(prompt) + t - 1] @ w + b).item() for t in range(len(completion))]


def segments_of(entropies: list[float], kept: list[int]) -> list[list[int]]:
    """Positions of each segment's tokens: a segment ends at a cut or before a hole."""
    count = math.ceil(len(kept) * TOP_PERCENT / 100)
    cuts = sorted(kept, key=lambda t: (-entropies[t], t))[:count]
    segments, current = [], []
    for t in kept:
        current.append(t)
        if t in cuts or t + 1 not in kept:
            segments.append(current)
            current = []
    return segments + ([current] if current else [])


def gae(rewards: list[float], values: list[float], lam: float) -> list[float]:
    advantages, running = [0.0] * len(rewards), 0.0
    for m in reversed(range(len(rewards))):
        following = values[m + 1] if m + 1 < len(rewards) else 0.0
        running = rewards[m] + GAMMA * following - values[m] + GAMMA * lam * running
        advantages[m] = running
    return advantages


CASES = {
    "paper": {},
    "official": {"value_state": "end", "critic_lam": 1.0, "loss_aggregation": "seq-mean-token-sum-norm"},
    "kl in the loss": {"kl_placement": "loss", "kl_estimator": "k3", "loss_aggregation": "seq-mean-token-mean"},
    "bias-corrected kl": {"kl_placement": "loss", "kl_estimator": "k2", "use_bias_correction_kl": True},
    "token ratio": {"importance_sampling_level": "token", "value_loss_aggregation": "seq-mean-token-mean"},
    "sequence ratio": {"importance_sampling_level": "sequence", "entropy_coef": 0.2, "whiten_advantages": False},
    "shared critic": {"critic": "shared"},
}


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("case", CASES)
def test_second_rollout_against_loops(family, case, holes, tmp_path):
    settings = {
        "kl_placement": "reward",
        "kl_estimator": "k1",
        "value_state": "start",
        "critic_lam": None,
        "loss_aggregation": "token-mean",
        "value_loss_aggregation": "token-mean",
        "importance_sampling_level": "segment",
        "use_bias_correction_kl": False,
        "entropy_coef": 0.0,
        "whiten_advantages": True,
        "critic": "separate",
        **CASES[case],
    }
    recorder, batches = Recorder(), []
    extra = {}
    if holes:
        extra["env_mask"] = lambda prompts, completions: [
            [int(t == 0 or (t + row) % 3 != 1) for t in range(len(ids))] for row, ids in enumerate(completions)
        ]
    trainer = sapo_trainer(
        family,
        tmp_path,
        max_steps=4,
        learning_rate=0.02,
        critic_learning_rate=0.02,
        beta=BETA,
        gamma=GAMMA,
        lam=LAM,
        temperature=TEMPERATURE,
        top_percent=TOP_PERCENT,
        advantage_clamp=CLAMP,
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
        delta=DELTA,
        cliprange_value=CLIPRANGE_VALUE,
        trainer_kwargs={
            "callbacks": [recorder],
            "rollout_func": fixed_rollout(random_completions(5), **extra),
        },
        **settings,
    )
    critic = trainer.critic.value_head
    weights = WeightRecorder(trainer.model, critic)
    weights.states.append([state_of(trainer.model), state_of(critic)])
    trainer.add_callback(weights)
    trainer.train()
    batches = trainer.micro_batches  # of the last rollout: which responses each of its optimizer steps saw

    def models_after(step: int):
        policy = family.build_model()
        policy.load_state_dict(weights.states[step][0])
        backbone = policy.model
        if settings["critic"] == "separate":
            backbone = family.build_model().model
            prefix = "backbone."
            backbone.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.states[step][1].items() if k.startswith(prefix)}
            )
        return policy.eval(), backbone.eval(), weights.states[step][1]

    # ---- the rollout, produced by the weights after two steps; the reference is the policy before the first
    rollout = recorder.rollouts[1]
    assert recorder.steps == [0, 2]
    policy, backbone, critic_weights = models_after(2)
    reference = models_after(0)[0]
    rows = []
    for row in range(4):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
        completion = random_completions(5)([None] * 4, trainer)[row]
        assert rollout.completion_ids[row, : len(completion)].tolist() == completion
        kept = [t for t in range(len(completion)) if not holes or t == 0 or (t + row) % 3 != 1]
        logps, entropies = token_statistics(policy, prompt, completion)
        values = state_values(critic_weights, backbone, prompt, completion)
        segments = segments_of(entropies, kept)
        token_rewards = [0.0] * len(completion)
        token_rewards[kept[-1]] = length_reward([completion])[0]
        reference_logps = token_statistics(reference, prompt, completion)[0]
        kl = [ours - theirs for ours, theirs in zip(logps, reference_logps, strict=True)]
        if settings["kl_placement"] == "reward":
            for t in kept:
                token_rewards[t] -= BETA * kl[t]
        segment_rewards = [sum(token_rewards[t] for t in segment) for segment in segments]
        states = [segment[0] if settings["value_state"] == "start" else segment[-1] for segment in segments]
        segment_values = [values[t] for t in states]
        advantages = gae(segment_rewards, segment_values, LAM)
        critic_lam = LAM if settings["critic_lam"] is None else settings["critic_lam"]
        targets = gae(segment_rewards, segment_values, critic_lam)
        rows.append(
            {
                "prompt": prompt,
                "completion": completion,
                "segments": segments,
                "kept": kept,
                "logps": logps,
                "reference_logps": reference_logps,
                "kl": kl,
                "values": values,
                "states": states,
                "raw": {t: a for segment, a in zip(segments, advantages, strict=True) for t in segment},
                "returns": {
                    t: a + v for segment, a, v in zip(segments, targets, segment_values, strict=True) for t in segment
                },
            }
        )
    assert any(len(row["segments"]) > 1 for row in rows)
    assert max(abs(k) for row in rows for k in row["kl"]) > 0.1

    everything = [a for row in rows for a in row["raw"].values()]
    mean = sum(everything) / len(everything)
    spread = math.sqrt(sum((a - mean) ** 2 for a in everything) / (len(everything) - 1))
    clamped = 0
    for index, row in enumerate(rows):
        row["advantages"] = {}
        for t, a in row["raw"].items():
            whitened = (a - mean) / spread if settings["whiten_advantages"] else a
            clamped += abs(whitened) > CLAMP
            row["advantages"][t] = max(-CLAMP, min(CLAMP, whitened))
        length = rollout.completion_ids.size(1)
        for name in ("advantages", "returns"):
            expected = [row[name].get(t, 0.0) for t in range(length)]
            assert getattr(rollout, name)[index].tolist() == pytest.approx(expected, abs=2e-4), (name, index)
        assert rollout.segments.ids[index].tolist() == [
            next((m for m, segment in enumerate(row["segments"]) if t in segment), -1) for t in range(length)
        ]
    if settings["whiten_advantages"]:
        assert clamped > 0
    kls = [row["kl"][t] for row in rows for t in row["kept"]]
    estimate = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) + d - 1}
    estimator = estimate[settings["kl_estimator"]]
    assert logged(trainer, "kl")[1] == pytest.approx(sum(map(estimator, kls)) / len(kls), abs=1e-4)

    # ---- its two optimizer steps, the second of which is off-policy
    for step in (0, 1):
        members = []
        for ids, mask in zip(batches[step]["completion_ids"], batches[step]["completion_mask"], strict=True):
            ids = ids[mask.bool()].tolist()
            members.append(next(row for row in rows if row["completion"] == ids))
        policy, backbone, critic_weights = models_after(2 + step)
        num_tokens = sum(len(row["kept"]) for row in members)
        num_segments = sum(len(row["segments"]) for row in members)
        policy_loss = value_loss = kl_loss = entropy = 0.0
        clipped_low = clipped_high = dual = value_clipped = 0
        ratios = []
        for row in members:
            logps, entropies = token_statistics(policy, row["prompt"], row["completion"])
            values = state_values(critic_weights, backbone, row["prompt"], row["completion"])
            groups = {
                "segment": row["segments"],
                "token": [[t] for t in row["kept"]],
                "sequence": [row["kept"]],
            }[settings["importance_sampling_level"]]
            losses, kl_losses = [], []
            for group in groups:
                ratio = math.exp(sum(logps[t] - row["logps"][t] for t in group) / len(group))
                for t in group:
                    a = row["advantages"][t]
                    low, high = 1 - EPSILON, 1 + EPSILON_HIGH
                    loss = max(-ratio * a, -min(max(ratio, low), high) * a)
                    clipped_low += ratio < low and a < 0
                    clipped_high += ratio > high and a > 0
                    if a < 0 and loss > -DELTA * a:
                        dual += 1
                        loss = -DELTA * a
                    losses.append(loss)
                    kl_losses.append(
                        estimator(logps[t] - row["reference_logps"][t])
                        * (ratio if settings["use_bias_correction_kl"] else 1)
                    )
                    ratios.append(ratio)
            share = {
                "token-mean": lambda xs: sum(xs) / num_tokens,  # noqa: B023
                "seq-mean-token-mean": lambda xs: sum(xs) / len(xs) / len(members),  # noqa: B023
                "seq-mean-token-sum-norm": lambda xs: sum(xs) / len(members) / 8,  # noqa: B023
            }[settings["loss_aggregation"]]
            policy_loss += share(losses)
            kl_loss += share(kl_losses)
            entropy += sum(entropies[t] for t in row["kept"]) / num_tokens
            errors = []
            for t in row["states"]:
                target, old, new = row["returns"][t], row["values"][t], values[t]
                near = min(max(new, old - CLIPRANGE_VALUE), old + CLIPRANGE_VALUE)
                value_clipped += (near - target) ** 2 > (new - target) ** 2
                errors.append(0.5 * max((new - target) ** 2, (near - target) ** 2))
            if settings["value_loss_aggregation"] == "token-mean":
                value_loss += sum(errors) / num_segments
            else:
                value_loss += sum(errors) / len(errors) / len(members)

        total = policy_loss - settings["entropy_coef"] * entropy
        if settings["kl_placement"] == "loss":
            total += BETA * kl_loss
        expected = {
            "policy_loss": policy_loss,
            "critic/loss": value_loss,
            "loss": total,
            "entropy": entropy,
            "clip_ratio/low_mean": clipped_low / num_tokens,
            "clip_ratio/high_mean": clipped_high / num_tokens,
            "clip_ratio/dual_mean": dual / num_tokens,
            "clip_ratio/region_mean": (clipped_low + clipped_high) / num_tokens,
            "ratio/mean": sum(ratios) / num_tokens,
            "ratio/max": max(ratios),
            "approx_kl": sum(-math.log(ratio) for ratio in ratios) / num_tokens,
            "critic/clip_ratio": value_clipped / num_segments,
        }
        for name, value in expected.items():
            assert logged(trainer, name)[2 + step] == pytest.approx(value, abs=3e-4), (name, step)
        assert (max(ratios) - min(ratios) > 0.05) == (step == 1)
        if step == 1:
            assert clipped_low + clipped_high > 0 and value_clipped > 0
