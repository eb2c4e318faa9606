"""`examples/sapo_in_one_file.py`: its numbers are the trainer's, and it trains."""

import ast
import contextlib
import copy
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from examples import sapo_in_one_file as one_file
from sapo_trl import SAPOConfig, SegmentValueHead
from sapo_trl import advantages as package_advantages
from sapo_trl import losses as package_losses
from sapo_trl.data import to_prompts
from sapo_trl.embedded import make_problems
from sapo_trl.embedded.evaluation import encode_prompts
from sapo_trl.metrics import explained_variance
from sapo_trl.presets import preset_settings
from sapo_trl.segmentation import entropy_segments
from tests.exact_arithmetic import exact_lm_head, make_exact
from tests.strategies import seeds
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


FILE = Path(one_file.__file__)
MAX_LINES = 280
IMAGE_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


def test_it_is_one_page_of_plain_torch():
    source = FILE.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    own = {module for module in modules if module.startswith("sapo_trl")}
    # The task only: not the mathematics, not the trainer.
    assert own == {"sapo_trl.embedded", "sapo_trl.embedded.evaluation", "sapo_trl.rewards"}
    assert {module.split(".")[0] for module in modules - own} == {"copy", "dataclasses", "torch", "transformers"}


def test_settings_are_the_preset_s(tmp_path):
    config = asdict(one_file.Config())
    task = {
        name: config.pop(name)
        for name in ("learning_rate", "critic_learning_rate", "max_completion_length", "batch_size")
    }
    for name in ("num_steps", "num_test_problems", "seed"):
        config.pop(name)
    preset = SAPOConfig.from_preset("sapo", output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert config == {name: getattr(preset, name) for name in config}
    assert preset.critic_max_grad_norm == config["max_grad_norm"] and preset.critic_weight_decay is None
    assert (preset.learning_rate, preset.critic_learning_rate) == (1e-6, 2e-6)  # as a comment there says

    embedded = yaml.safe_load((FILE.parents[1] / "trainer_configs" / "embedded.yaml").read_text())
    task["batch_size"] //= config["num_mini_batches"]
    names = {"batch_size": "per_device_train_batch_size"}
    assert task == {name: embedded[names.get(name, name)] for name in task}


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    top_percent=st.integers(1, 100),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    epsilon=st.floats(0.01, 0.5),
    seed=seeds,
)
def test_mathematics_is_the_package_s(lengths, top_percent, gamma, lam, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)

    def noise():
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    entropies = (4 * noise()).round().abs()  # with ties
    segment_ids = one_file.cut_into_segments(entropies, mask, float(top_percent))
    segments = entropy_segments(entropies, mask, float(top_percent))
    assert torch.equal(segment_ids, segments.ids)

    rewards, values, logps, old_logps, new_values = (noise() for _ in range(5))
    logps.requires_grad_()
    new_values.requires_grad_()
    at_start = one_file.segment_sum(values * segments.is_first, segment_ids)
    advantages, returns = one_file.segment_gae(one_file.segment_sum(rewards, segment_ids), at_start, gamma, lam)
    expected = package_advantages.segment_gae(rewards, values, segments, gamma, lam)
    for ours, theirs in zip((advantages, returns), expected, strict=True):
        close(one_file.to_tokens(ours, segment_ids), theirs)
    rollout = one_file.Rollout({}, old_logps, segment_ids, at_start, advantages, returns)
    theirs = explained_variance(values, expected[1], segments.is_first)
    if theirs.isfinite():
        assert one_file.explained_variance(rollout) == pytest.approx(theirs.item(), rel=1e-6)

    average = "seq-mean-token-mean"
    ours = (
        one_file.policy_loss(logps, old_logps, advantages, segment_ids, epsilon),
        one_file.value_loss(one_file.segment_sum(new_values * segments.is_first, segment_ids), returns, segment_ids),
    )
    theirs = (
        package_losses.clipped_policy_loss(
            logps, old_logps, expected[0], mask, segments, epsilon, epsilon, None, average
        ),
        package_losses.segment_value_loss(new_values, values, expected[1], segments, "start", None, average),
    )
    for loss, output, inputs in zip(ours, theirs, (logps, new_values), strict=True):
        close(loss, output.loss)
        close(torch.autograd.grad(loss, inputs)[0], torch.autograd.grad(output.loss, inputs)[0])


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class RowRecorder(Recorder):
    """Keeps every rollout, and the rows of every mini-batch."""

    def __init__(self):
        super().__init__()
        self.rows: list[torch.Tensor] = []

    def on_policy_forward(self, args, state, control, rows, log_ratios):
        self.rows.append(rows.clone())


@IMAGE_FAMILY
@pytest.mark.parametrize(
    ("dtype", "rollouts", "tolerance", "weight_tolerance"),
    # In float32 Adam turns the rounding of gradients near zero into steps, so weights differ more than gradients.
    [(torch.float32, 1, 1e-6, 1e-4), (torch.float64, 2, 1e-9, 1e-12)],
    ids=["float32", "float64"],
)
def test_numbers_are_the_trainer_s(family, dtype, rollouts, tolerance, weight_tolerance, tmp_path):
    """Six responses a rollout and two optimizer steps, the second of them off-policy."""
    problems = make_problems(6 * rollouts)
    completions = random_completions(5, 1, 24)
    # Without weight decay: transformers also decays some norms of the vision tower (see below).
    overrides = {"learning_rate": 1e-3, "critic_learning_rate": 3e-3, "beta": 0.1, "weight_decay": 0.0}
    model = family.build_model()
    model = make_exact(model) if dtype == torch.float64 else model
    value_head = SegmentValueHead.from_policy(model).to(dtype)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    critic = one_file.Critic(policy).to(dtype)
    critic.load_state_dict(value_head.state_dict())

    recorder = RowRecorder()
    trainer = sapo_trainer(
        family,
        tmp_path,
        model=model,
        max_steps=2 * rollouts,
        per_device_train_batch_size=3,
        num_mini_batches=2,
        max_completion_length=24,
        shuffle_dataset=False,
        trainer_kwargs={
            "value_model": value_head,
            "train_dataset": to_prompts(problems),
            "callbacks": [recorder],
            "rollout_func": fixed_rollout(completions),
        },
        **preset_settings("sapo") | overrides,
    )
    weights = WeightRecorder(trainer.model, value_head)
    trainer.add_callback(weights)
    with exact_lm_head() if dtype == torch.float64 else contextlib.nullcontext():
        trainer.train()

    config = one_file.Config(**overrides)
    optimizer = one_file.make_optimizer(policy, critic, config)
    ids = completions([None] * 6, trainer)
    completion_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
    rewards = torch.tensor(length_reward(ids))
    for index, theirs in enumerate(recorder.rollouts):
        prompts = encode_prompts(family.processing_class, problems.select(range(6 * index, 6 * index + 6)))
        assert torch.equal(prompts["input_ids"], theirs.prompt_ids)
        inputs = one_file.append_completions(prompts, completion_ids, mask)
        rollout = one_file.make_rollout(policy, reference, critic, inputs, mask, rewards, config)

        assert torch.equal(rollout.segment_ids, theirs.segments.ids)
        assert rollout.segment_ids.max() > 3
        close(torch.where(mask, rollout.old_logps, 0), torch.where(mask, theirs.logps, 0), tolerance)
        for name in ("advantages", "returns"):
            close(one_file.to_tokens(getattr(rollout, name), rollout.segment_ids), getattr(theirs, name), tolerance)
        values = one_file.to_tokens(rollout.values, rollout.segment_ids)
        is_first = theirs.segments.is_first
        close(values[is_first], theirs.values[is_first], tolerance)

        for step in (2 * index, 2 * index + 1):
            losses = one_file.update(policy, critic, optimizer, rollout, recorder.rows[step], config)
            # The log is in float32.
            assert losses[0] == pytest.approx(logged(trainer, "policy_loss")[step], abs=1e-6)
            assert losses[1] == pytest.approx(logged(trainer, "critic/loss")[step], abs=1e-6)
            for ours, their_weights in zip((policy, critic), weights.states[step], strict=True):
                ours = state_of(ours)
                assert ours.keys() == their_weights.keys()
                for name, parameter in ours.items():
                    close(parameter, their_weights[name], weight_tolerance)
    assert step == 2 * rollouts - 1
    # What is compared is not trivial: ratios were clipped, and the policy had left the reference.
    assert logged(trainer, "clip_ratio/region_mean")[1] > 0.1
    assert [abs(kl) > 0.1 for kl in logged(trainer, "kl")] == [False, True][:rollouts]

    ours = {name for name, parameter in policy.named_parameters() if parameter.dim() > 1}
    theirs = set(trainer.get_decay_parameter_names(policy))
    assert ours <= theirs and all(re.search(r"visual.*(norm\d|ln_q)\.weight", name) for name in theirs - ours)


@IMAGE_FAMILY
def test_responses_end_with_the_first_end_of_sequence_token(family):
    torch.manual_seed(0)
    prompts = encode_prompts(family.processing_class, make_problems(16))
    config = one_file.Config(max_completion_length=48)
    ids, mask = one_file.generate(family.build_model(), family.processing_class, prompts, config)
    eos = family.tokenizer.eos_token_id
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in ids.tolist()]
    assert mask.tolist() == [[t < length for t in range(ids.size(1))] for length in lengths]
    assert min(lengths) < max(lengths) == 48


@IMAGE_FAMILY
def test_it_runs_as_a_script(family, tmp_path, monkeypatch, capsys):
    family.build_model().save_pretrained(tmp_path)
    family.processing_class.save_pretrained(tmp_path)
    monkeypatch.setattr("sapo_trl.embedded.warm_start", lambda cache_dir: tmp_path)
    arguments = ["--num_steps", "2", "--batch_size", "8", "--num_test_problems", "4", "--max_completion_length", "8"]
    monkeypatch.setattr(sys, "argv", [str(FILE), *arguments])
    runpy.run_path(str(FILE), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("accuracy", "step"))]
    names = ["reward", "segments", "policy loss", "value loss", "explained variance"]
    number = r" +([-+]?\d+\.\d+)"
    assert [line.split(":")[0] for line in lines if line.startswith("accuracy")] == [
        "accuracy before",
        "accuracy after",
    ]
    for step, line in enumerate(lines[1:-1], 1):
        found = re.fullmatch(f"step {step} +" + " +".join(name + number for name in names), line)
        # 30 % of the eight tokens end a segment, and so does the last token.
        assert found is not None and 3.0 <= float(found[2]) <= 4.0, line
    assert len(lines) == 4


@pytest.mark.slow
@IMAGE_FAMILY
def test_it_learns(family, monkeypatch, capsys):
    """An untrained model writes random characters; digits are rewarded here, so digits become more frequent."""

    def share_of_digits(completions, answer):
        return [sum(character.isdigit() for character in text) / 8 for text in completions]

    monkeypatch.setattr(one_file, "accuracy_reward", share_of_digits)
    config = one_file.Config(
        learning_rate=3e-3, critic_learning_rate=9e-3, batch_size=32, max_completion_length=8, num_steps=12
    )
    one_file.train(family.build_model(), family.processing_class, config)
    rewards = [float(reward) for reward in re.findall(r"reward (\S+)", capsys.readouterr().out)]
    assert len(rewards) == 12 and max(rewards[:2]) < 0.1 and min(rewards[-2:]) > 0.2
