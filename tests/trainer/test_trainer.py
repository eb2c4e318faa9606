"""`SAPOTrainer` trains, on three model families, and computes what a plain forward and plain loops compute."""

import copy
import math
import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

import sapo_trl
from sapo_trl import SAPOTrainer
from sapo_trl.segments import Segments
from sapo_trl.trainer.trl import forward
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


# Both critics with text; each kind of image with one of them, and with the other one where time does not matter.
WITH_IMAGES = [
    ("qwen2_5_vl", "separate"),
    pytest.param("qwen2_5_vl", "shared", marks=pytest.mark.slow),
    pytest.param("qwen3_vl", "separate", marks=pytest.mark.slow),
    ("qwen3_vl", "shared"),
    ("qwen2_5_vl", "ladder"),
    pytest.param("qwen3_vl", "ladder", marks=pytest.mark.slow),
]
FAMILIES_AND_CRITICS = pytest.mark.parametrize(
    ("family", "critic"),
    [*(("qwen2", critic) for critic in ("separate", "shared", "ladder")), *WITH_IMAGES],
    indirect=["family"],
)
IMAGES_AND_CRITICS = pytest.mark.parametrize(("family", "critic"), WITH_IMAGES, indirect=["family"])
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared", "ladder"])


def mixed_dataset(family, without: list | None) -> Dataset:
    """Every other prompt has no image; `without` is what its column `images` holds."""
    rows = list(family.dataset(8))

    def generate():
        for index, row in enumerate(rows):
            if index % 2:
                text = {"type": "text", "text": row["prompt"][0]["content"][-1]["text"]}
                row = {**row, "prompt": [{"role": "user", "content": [text]}], "images": without}
            yield row

    return Dataset.from_generator(generate, features=family.dataset(1).features)


def assert_finite(trainer: SAPOTrainer) -> None:
    for name in ("loss", "policy_loss", "critic/loss", "grad_norm", "critic/grad_norm"):
        values = logged(trainer, name)
        assert len(values) == trainer.state.max_steps, name
        assert all(value is not None and math.isfinite(value) for value in values), (name, values)
    for module in (trainer.model, trainer.critic.value_head):
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), name


class TestTraining:
    @FAMILIES_AND_CRITICS
    def test_every_parameter_of_policy_and_critic_moves(self, family, critic, tmp_path):
        trainer = sapo_trainer(family, tmp_path, critic=critic)
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        trainer.train()
        assert_finite(trainer)
        assert unmoved(policy, trainer.model) == []
        assert unmoved(value_head, trainer.critic.value_head) == []
        assert any(name.startswith("backbone.") for name in value_head) == (critic == "separate")

    @FAMILIES_AND_CRITICS
    def test_frozen_parameters_stay(self, family, critic, tmp_path):
        model = family.build_model()
        frozen_part = model.model.visual if family.takes_images else model.model.embed_tokens
        frozen_part.requires_grad_(False)
        trainer = sapo_trainer(family, tmp_path, model=model, critic=critic)
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
        assert frozen and len(frozen) < len(policy)
        trainer.train()
        assert set(unmoved(policy, trainer.model)) == frozen
        expected = {name.replace("model.", "backbone.", 1) for name in frozen} if critic == "separate" else set()
        assert set(unmoved(value_head, trainer.critic.value_head)) == expected

    @TEXT_FAMILY
    def test_without_critic_the_policy_trains(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(family, tmp_path, critic="none", trainer_kwargs={"callbacks": [recorder]})
        policy = state_of(trainer.model)
        trainer.train()
        assert trainer.critic is None
        assert unmoved(policy, trainer.model) == []
        assert recorder.rollouts[0].values.abs().max() == 0
        assert "critic/loss" not in trainer.state.log_history[0]

    @TEXT_FAMILY
    @CRITICS
    def test_equal_rewards(self, family, critic, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            trainer_kwargs={"reward_funcs": lambda completions, **kwargs: [1.0] * len(completions)},
        )
        trainer.train()
        assert_finite(trainer)

    @FAMILIES_AND_CRITICS
    def test_all_completions_truncated_and_masked(self, family, critic, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            mask_truncated_completions=True,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions())},  # none of them ends
        )
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        trainer.train()
        assert_finite(trainer)
        assert logged(trainer, "completions/clipped_ratio") == [1.0]
        # Nothing to learn from: not one parameter moves.
        assert len(unmoved(policy, trainer.model)) == len(policy)
        assert len(unmoved(value_head, trainer.critic.value_head)) == len(value_head)

    @TEXT_FAMILY
    @CRITICS
    def test_all_completions_truncated_and_learned_from(self, family, critic, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions())},
        )
        policy = state_of(trainer.model)
        trainer.train()
        assert_finite(trainer)
        assert unmoved(policy, trainer.model) == []

    @FAMILIES_AND_CRITICS
    def test_completions_of_one_token(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family, tmp_path, critic=critic, max_completion_length=1, trainer_kwargs={"callbacks": [recorder]}
        )
        policy = state_of(trainer.model)
        trainer.train()
        assert_finite(trainer)
        assert recorder.rollouts[0].segments.count.tolist() == [1] * 4
        assert recorder.rollouts[0].completion_ids.shape == (4, 1)
        assert unmoved(policy, trainer.model) == []

    @TEXT_FAMILY
    def test_one_token_among_longer_completions(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(lambda prompts, _: [[30], *[[40, 50, 60, 70]] * (len(prompts) - 1)]),
            },
        )
        trainer.train()
        assert_finite(trainer)
        # ceil(30 % of 4) = 2 cuts, and the last token closes one.
        counts = recorder.rollouts[0].segments.count.tolist()
        assert counts[0] == 1 and all(2 <= count <= 3 for count in counts[1:])

    @IMAGES_AND_CRITICS
    @pytest.mark.parametrize("without", [[], None], ids=["empty", "none"])
    def test_prompts_without_image_among_prompts_with_one(self, family, critic, without, tmp_path):
        # One row per micro-batch: some of them have no image at all.
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            per_device_train_batch_size=1,
            num_mini_batches=4,
            max_steps=4,
            trainer_kwargs={"train_dataset": mixed_dataset(family, without)},
        )
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        trainer.train()
        assert_finite(trainer)
        assert unmoved(policy, trainer.model) == []
        assert unmoved(value_head, trainer.critic.value_head) == []

    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    def test_column_image_with_gaps(self, family, tmp_path):
        dataset = mixed_dataset(family, None)
        rows = [{**row, "image": (row.pop("images") or [None])[0]} for row in dataset]
        features = copy.copy(dataset.features)
        features["image"] = features.pop("images").feature
        dataset = Dataset.from_generator(lambda: iter(rows), features=features)
        assert [row["image"] is None for row in dataset] == [False, True] * 4
        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": dataset})
        trainer.train()
        assert_finite(trainer)

    @TEXT_FAMILY
    @CRITICS
    def test_bfloat16_autocast_keeps_the_critic_in_float32(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(family, tmp_path, critic=critic, bf16=True, trainer_kwargs={"callbacks": [recorder]})
        trainer.train()
        assert_finite(trainer)
        rollout = recorder.rollouts[0]
        for tensor in (rollout.values, rollout.logps, rollout.entropies, rollout.advantages):
            assert tensor.dtype == torch.float32
        # Values that went through bfloat16 would be multiples of a power of two with 8 bits of mantissa.
        assert not torch.equal(rollout.values, rollout.values.bfloat16().float())


def prompt_batch(family, rows: list[dict]) -> dict:
    """The prompt part of a batch as the processing class makes it, padded on the left."""
    if not family.takes_images:
        encoded = family.tokenizer.apply_chat_template(
            [row["prompt"] for row in rows], add_generation_prompt=True, padding=True, return_tensors="pt"
        )
        return {"prompt_ids": encoded["input_ids"], "prompt_mask": encoded["attention_mask"]}
    texts = family.processing_class.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, tokenize=False
    )
    encoded = family.processing_class(
        text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt"
    )
    return {
        "prompt_ids": encoded["input_ids"],
        "prompt_mask": encoded["attention_mask"],
        "num_images": [len(row["images"]) for row in rows],
        **{key: encoded[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if key in encoded},
    }


def make_batch(family, rows: list[dict], completions: list[list[int]]) -> dict:
    batch = prompt_batch(family, rows)
    length = max(map(len, completions))
    pad_id = family.tokenizer.pad_token_id
    batch["completion_ids"] = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in completions])
    batch["completion_mask"] = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in completions])
    if "mm_token_type_ids" in batch:
        types = batch["mm_token_type_ids"]
        batch["mm_token_type_ids"] = torch.cat([types, types.new_zeros(batch["completion_ids"].shape)], dim=1)
    return batch


def plain_forward(model, value_head, batch: dict, temperature: float):
    """
    Of a batch of one row without padding: log-probabilities, entropies and values by the plain transformers forward of
    an untouched model, in float64 after it.
    """
    assert batch["prompt_mask"].all() and batch["completion_mask"].all() and len(batch["prompt_ids"]) == 1
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        **{key: batch[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if key in batch},
    }
    with torch.no_grad():
        logits = model(**inputs).logits[0].double() / temperature
        hidden = model.base_model(**inputs, output_hidden_states=True)
        assert torch.equal(hidden.hidden_states[-1], hidden.last_hidden_state)
        depths = value_head.depths(model) if value_head.reads else [-1]
        read = [hidden.hidden_states[depth].double() for depth in depths]
        after = copy.deepcopy(value_head).double()(hidden_states=read if value_head.reads else read[0])[0]
    probabilities = torch.softmax(logits, dim=-1)
    logps, entropies, values = [], [], []
    first = batch["prompt_ids"].size(1)
    for position, token in enumerate(batch["completion_ids"][0].tolist(), start=first):
        before = position - 1  # the state before this token
        logps.append(math.log(probabilities[before, token]))
        entropies.append(-(probabilities[before] * probabilities[before].log()).sum().item())
        values.append(after[before].item())
    return torch.tensor(logps), torch.tensor(entropies), torch.tensor(values)


class TestForward:
    COMPLETIONS = [[30, 41, 52, 63, 74], [85, 96, 107], [118]]
    TEMPERATURE = 0.7

    def rows(self, family) -> list[dict]:
        rows = list(family.dataset(3))
        # Prompts of unequal length, so that the batch is padded on the left.
        for index, row in enumerate(rows):
            content = row["prompt"][-1]["content"]
            longer = " Find AB." * index
            if isinstance(content, str):
                row["prompt"][-1]["content"] = content + longer
            else:
                content[-1]["text"] += longer
        return rows

    @FAMILIES_AND_CRITICS
    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_row_of_a_padded_batch_equals_plain_forward_alone(self, family, critic, batch_size, tmp_path):
        sizes = {"critic_reads": 3} if critic == "ladder" else {}  # also between the two layers
        trainer = sapo_trainer(family, tmp_path, critic=critic, temperature=self.TEMPERATURE, **sizes)
        rows = self.rows(family)
        if family.takes_images:
            rows[1] = {**rows[1], "images": rows[1]["images"] * 2}  # two pictures in the middle row
            rows[1]["prompt"][-1]["content"].insert(0, {"type": "image"})
        batch = make_batch(family, rows, self.COMPLETIONS)
        assert not batch["prompt_mask"].all() and not batch["completion_mask"].all()
        with torch.no_grad():
            forward = trainer.policy_forward(trainer.model, batch, batch_size)
            values = forward.values
            if critic == "separate":
                assert values is None
                values = trainer.critic_forward(trainer.critic.module, batch, batch_size)
        assert forward.logps.shape == forward.entropies.shape == values.shape == (3, 5)

        plain_model, value_head = family.build_model().eval(), trainer.critic.value_head
        for index, (row, completion) in enumerate(zip(rows, self.COMPLETIONS, strict=True)):
            alone = make_batch(family, [row], [completion])
            expected = plain_forward(plain_model, value_head, alone, self.TEMPERATURE)
            got = (forward.logps[index], forward.entropies[index], values[index])
            for name, ours, theirs in zip(("logps", "entropies", "values"), got, expected, strict=True):
                torch.testing.assert_close(
                    ours[: len(completion)].double(), theirs.double(), rtol=0, atol=2e-5, msg=lambda m, n=name: n + m
                )

    @IMAGES_AND_CRITICS
    def test_row_without_image_equals_plain_text_forward(self, family, critic, tmp_path):
        trainer = sapo_trainer(family, tmp_path, critic=critic, temperature=self.TEMPERATURE)
        rows = self.rows(family)
        text = rows[1]["prompt"][-1]["content"][-1]
        rows[1] = {"prompt": [{"role": "user", "content": [text]}], "images": []}
        batch = make_batch(family, rows, self.COMPLETIONS)
        plain_model, value_head = family.build_model().eval(), trainer.critic.value_head
        alone = {
            "prompt_ids": batch["prompt_ids"][1:2, batch["prompt_mask"][1].bool()],
            "completion_ids": torch.tensor(self.COMPLETIONS[1:2]),
        }
        alone |= {"prompt_mask": torch.ones_like(alone["prompt_ids"])}
        alone |= {"completion_mask": torch.ones_like(alone["completion_ids"])}
        expected = plain_forward(plain_model, value_head, alone, self.TEMPERATURE)
        for batch_size in (None, 1):  # together with its neighbours, and in a chunk of its own
            with torch.no_grad():
                forward = trainer.policy_forward(trainer.model, batch, batch_size)
                values = forward.values
                if values is None:
                    values = trainer.critic_forward(trainer.critic.module, batch, batch_size)
            for ours, theirs in zip((forward.logps, forward.entropies, values), expected, strict=True):
                torch.testing.assert_close(ours[1, :3].double(), theirs.double(), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    def test_picture_matters(self, family, tmp_path):
        """The test above would pass with an ignored picture if the plain forward ignored it too."""
        trainer = sapo_trainer(family, tmp_path)
        rows = self.rows(family)
        batch = make_batch(family, rows, self.COMPLETIONS)
        with torch.no_grad():
            logps = trainer.policy_forward(trainer.model, batch).logps
            values = trainer.critic_forward(trainer.critic.module, batch)
            batch["pixel_values"] = batch["pixel_values"].flip(0)
            assert (trainer.policy_forward(trainer.model, batch).logps - logps).abs().max() > 1e-3
            assert (trainer.critic_forward(trainer.critic.module, batch) - values).abs().max() > 1e-3


class DeviceReads(TorchDispatchMode):
    """Lines of this package by which the host reads what is on the device, and on a GPU waits for it."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func == torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func in self.READS:
            # Of the libraries' frames and ours the one that asked.
            frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            if Path(frame.filename).is_relative_to(Path(sapo_trl.__file__).parent):
                self.lines.append(f"{frame.filename}:{frame.lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "frozen"), [("qwen2", False), ("qwen2_5_vl", False), ("qwen2_5_vl", True)], indirect=["family"]
)
@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_the_device_is_not_read_inside_of_an_optimizer_step(family, frozen, level, tmp_path, monkeypatch):
    """From its second micro-batch to the last but one: rollouts and updates may wait for the device."""
    model = family.build_model()
    if frozen:
        model.model.visual.requires_grad_(False)
    trainer = sapo_trainer(
        family,
        tmp_path,
        model=model,
        importance_sampling_level=level,
        beta=0.1,
        kl_placement="loss",
        kl_estimator="k3",
        entropy_coef=0.1,
        gradient_accumulation_steps=4,
        num_mini_batches=1,
        max_steps=1,
        trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
    )
    training_step, reads, micro_batches, image_keys_made = trainer.training_step, DeviceReads(), [], []
    make_keys = forward.image_keys

    def noted_keys(*args):
        image_keys_made.extend(micro_batches[1:])
        return make_keys(*args)

    monkeypatch.setattr(forward, "image_keys", noted_keys)

    def watched(*args):
        micro_batches.append(None)
        if len(micro_batches) not in (2, 3):
            return training_step(*args)
        with reads:
            return training_step(*args)

    trainer.training_step = watched
    trainer.train()
    assert len(micro_batches) == 4 and reads.lines == []
    # Of the search itself.
    with reads:
        Segments(torch.tensor([[0, 1]])).sum(torch.ones(1, 2))
    assert len(reads.lines) == 1 and "segments.py" in reads.lines[0]
    # On a CPU lists are made of tensors without an operation that could be seen.
    assert image_keys_made == []


class TestMicroBatches:
    """An optimizer step's update does not depend on how its responses are cut into micro-batches."""

    def run(self, family, folder, per_device: int, **overrides):
        trainer = sapo_trainer(
            family,
            folder,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=4 // per_device,
            num_mini_batches=2,
            max_steps=2,
            optim="sgd",
            max_grad_norm=1e6,
            critic_max_grad_norm=1e6,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
            **overrides,
        )
        before = [state_of(trainer.model), state_of(trainer.critic.value_head)]
        trainer.train()
        after = [state_of(trainer.model), state_of(trainer.critic.value_head)]
        updates = [
            torch.cat([(new[name] - old[name]).flatten() for name in old])
            for old, new in zip(before, after, strict=True)
        ]
        return updates, trainer

    @pytest.mark.parametrize(
        ("family", "settings"),
        [
            ("qwen2", {}),
            ("qwen2", {"loss_aggregation": "seq-mean-token-mean", "value_loss_aggregation": "seq-mean-token-mean"}),
            (
                "qwen2",
                {"loss_aggregation": "seq-mean-token-sum-norm", "value_loss_aggregation": "seq-mean-token-sum-norm"},
            ),
            ("qwen2", {"loss_aggregation": "seq-mean-token-mean"}),
            ("qwen2", {"critic": "shared"}),
            ("qwen2", {"kl_placement": "loss", "kl_estimator": "k3", "beta": 0.5, "entropy_coef": 0.1}),
            ("qwen2", {"critic_warmup_steps": 1}),
            ("qwen2", {"critic_warmup_steps": 1, "critic": "shared"}),
            ("qwen2", {"critic_warmup_steps": 1, "critic": "ladder"}),
            ("qwen2_5_vl", {}),
            pytest.param("qwen2_5_vl", {"critic": "shared"}, marks=pytest.mark.slow),
        ],
        indirect=["family"],
    )
    def test_update_is_that_of_the_whole_batch(self, family, settings, tmp_path):
        whole, whole_trainer = self.run(family, tmp_path / "whole", per_device=4, **settings)
        first, second = whole_trainer.micro_batches
        # What the losses are divided by must differ between the mini-batches, or mixing it up would go unnoticed.
        for count in (
            lambda batch: (batch["segment_ids"] >= 0).sum(),
            lambda batch: batch["segment_ids"].amax(1).sum(),
        ):
            assert count(first) != count(second)
        for per_device in (2, 1):
            parts, parts_trainer = self.run(family, tmp_path / "parts", per_device=per_device, **settings)
            for update, expected in zip(parts, whole, strict=True):
                assert expected.abs().max() > 1e-3
                torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            for name in ("policy_loss", "critic/loss", "approx_kl_k3", "clip_ratio/low_mean", "entropy"):
                assert logged(parts_trainer, name) == pytest.approx(logged(whole_trainer, name), abs=1e-5), name
