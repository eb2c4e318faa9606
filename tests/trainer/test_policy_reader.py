"""A critic reads the policy's hidden states in the policy's own forward: once, at once, and nothing goes back."""

import itertools
import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PretrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    TrainerCallback,
)

from sapo_trl import SegmentValueHead, ValueDiagnostics
from sapo_trl.critic.ladder import LadderSizes
from sapo_trl.critic.policy_states import decoder_layers
from sapo_trl.critic.value_head import backbone_of
from sapo_trl.trainer.policy_reader import PolicyReader
from tests.testing_utils import (
    Family,
    Recorder,
    WeightRecorder,
    advantages_of_tokens,
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

READERS = {"shared": {"critic": "shared"}, "shared reads": {"critic": "shared", "critic_reads": 3}}
READERS |= {"ladder": {"critic": "ladder", "critic_reads": 3}}
EACH_READER = pytest.mark.parametrize("reader", list(READERS))

CHECKPOINTING = {
    "no checkpointing": {"gradient_checkpointing": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


class GradientRecorder(TrainerCallback):
    """Keeps the policy's gradients of every optimizer step, after the critic's backward."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def reading_trainer(family, tmp_path, reader, *, callbacks=(), model=None, **settings):
    kwargs = {"rollout_func": fixed_rollout(random_completions(5)), "callbacks": list(callbacks)}
    settings = {"beta": 0.0, "cliprange_value": None, **READERS.get(reader, {"critic": reader}), **settings}
    return sapo_trainer(family, tmp_path, model=model, trainer_kwargs=kwargs, **settings)


def with_lora(model):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))


class SmallBackbone(nn.Module):
    """Calls its three layers, with their hooks, within a checkpoint."""

    def __init__(self, use_reentrant: bool | None):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=3, hidden_size=8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.use_reentrant = use_reentrant

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, hidden: torch.Tensor) -> SimpleNamespace:
        for layer in self.layers:
            if self.use_reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer.__call__, hidden, use_reentrant=self.use_reentrant)
        return SimpleNamespace(last_hidden_state=hidden)


class TestNothingReachesThePolicy:
    """The policy's gradient is to the last bit the one that it has without a critic, at equal advantages."""

    def gradients(self, family, tmp_path, critic, lora, **settings) -> list[dict[str, torch.Tensor]]:
        recorder, model = GradientRecorder(), family.build_model()
        model = with_lora(model) if lora else model
        trainer = reading_trainer(family, tmp_path, critic, model=model, callbacks=[recorder], **settings)
        trainer.estimate_advantages = advantages_of_tokens
        trainer.train()
        if critic != "none":
            assert min(logged(trainer, "critic/grad_norm")) > 1e-3
        return recorder.gradients

    @pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
    @pytest.mark.parametrize(
        ("family", "critic", "lora"),
        [
            ("qwen2", "ladder", False),
            ("qwen2", "ladder", True),
            ("qwen2", "shared reads", True),
            ("qwen2", "separate", False),
            ("qwen2", "adapter", True),
            ("qwen2_5_vl", "ladder", True),
            ("qwen2", "shared", False),
            ("qwen2", "shared reads", False),
            ("qwen2", "separate", True),
            ("qwen2_5_vl", "ladder", False),
            ("qwen3_vl", "ladder", True),
        ],
        indirect=["family"],
    )
    def test_gradient_is_that_without_a_critic(self, family, critic, lora, checkpointing, tmp_path):
        settings = {**CHECKPOINTING[checkpointing], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        expected = self.gradients(family, tmp_path, "none", lora, **settings)
        gradients = self.gradients(family, tmp_path, critic, lora, **settings)
        assert len(expected) == len(gradients) == 2
        for own, without in zip(gradients, expected, strict=True):
            own = {name: gradient for name, gradient in own.items() if ".critic." not in name}
            assert own.keys() == without.keys() and any(gradient.abs().max() > 1e-4 for gradient in own.values())
            assert all(torch.equal(own[name], gradient) for name, gradient in without.items())


class TestTaps:
    @EACH_READER
    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_gradient_checkpointing_changes_nothing_and_feeds_nothing_twice(
        self, family, reader, tmp_path, monkeypatch
    ):
        runs, take = [], SegmentValueHead.take
        for kind, settings in CHECKPOINTING.items():
            taken: list[int] = []

            def counted(self, index, states, taken=taken):
                taken.append(index)
                assert not states.requires_grad
                return take(self, index, states)

            monkeypatch.setattr(SegmentValueHead, "take", counted)
            recorder = Recorder()
            trainer = reading_trainer(family, tmp_path, reader, callbacks=[recorder], **settings)
            weights = WeightRecorder(trainer.critic.value_head, trainer.model)
            trainer.add_callback(weights)
            trainer.train()
            # Two forwards that score, and one of each micro-batch.
            assert taken == 4 * list(range(trainer.critic.value_head.reads)), kind
            runs.append((recorder.rollouts[0].values, weights.states))
        for values, states in runs[1:]:
            assert torch.equal(values, runs[0][0]) and values.std() > 0
            for modules, expected in zip(states, runs[0][1], strict=True):
                for own, other in zip(modules, expected, strict=True):
                    for name, tensor in other.items():
                        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-6, msg=name)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("kind", ["shared", "ladder", "ladder that recomputes"])
    def test_hooks_inside_of_a_checkpoint(self, kind, use_reentrant):
        """Where layers are called within the checkpoint: it must neither drop nor repeat the critic's part."""
        results = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            backbone = SmallBackbone(use_reentrant if checkpointed else None)
            critic = SegmentValueHead(8, reads=4)
            if kind != "shared":
                critic = SegmentValueHead(8, ladder=LadderSizes(2, 64, 4))
                critic.ladder.checkpoints = kind == "ladder that recomputes"
            hidden, values = torch.randn(2, 5, 8, requires_grad=True), []
            with PolicyReader(critic, learns=True).tapped(backbone, torch.ones(2, 5), values.append):
                output = backbone(hidden).last_hidden_state
            output.square().sum().backward()
            policy = [parameter.grad.clone() for parameter in backbone.parameters()]
            values[0].square().sum().backward()
            assert len(values) == 1
            assert all(torch.equal(p.grad, before) for p, before in zip(backbone.parameters(), policy, strict=True))
            results.append((values[0], policy, [parameter.grad for parameter in critic.parameters()]))
        (values, policy, gradients), (again, policy_again, gradients_again) = results
        assert torch.equal(values, again)
        for one, other in zip(policy + gradients, policy_again + gradients_again, strict=True):
            assert one.abs().max() > 0 and torch.equal(one, other)

    @TEXT_FAMILY
    @pytest.mark.parametrize("reader", ["shared reads", "ladder"])
    def test_states_are_projected_at_once(self, family, reader, tmp_path):
        """When the last state is read, those before it are gone."""
        trainer = reading_trainer(family, tmp_path, reader, max_steps=1)
        alive, seen = [], []
        backbone = trainer.model.model

        def keep(_module, _args, output):
            seen.append(weakref.ref(output if torch.is_tensor(output) else output[0]))

        decoder_layers(backbone)[0].register_forward_hook(keep)
        backbone.norm.register_forward_hook(
            lambda *_: alive.append(seen[-1]() is not None) if not torch.is_grad_enabled() else None
        )
        trainer.train()
        assert alive == [False, False]

    @EACH_READER
    @TEXT_FAMILY
    def test_hooks_are_gone_after_a_forward(self, family, reader, tmp_path):
        trainer = reading_trainer(family, tmp_path, reader, max_steps=1)
        trainer.train()
        for module in trainer.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks, type(module)

    @TEXT_FAMILY
    def test_more_states_than_the_policy_has(self, family, tmp_path):
        with pytest.raises(ValueError, match="`critic_reads` is 4, but a policy of 2 layers has 3.*at most 3"):
            reading_trainer(family, tmp_path, "ladder", critic_reads=4)

    @TEXT_FAMILY
    def test_value_model_of_other_sizes(self, family, tmp_path):
        """A saved ladder is taken as it is; settings that contradict it are an error."""
        critic = SegmentValueHead.from_policy(family.build_model(), mode="ladder", layers=3)
        critic.save_pretrained(tmp_path / "saved")
        contradictions = [({"critic_layers": 2}, "has `critic_layers=3`, not 2: set `critic_layers=3`")]
        contradictions += [({"critic_width": 128}, "has `critic_width=64`, not 128")]
        for value_model, (settings, error) in itertools.product(
            (str(tmp_path / "saved"), critic), [({}, None), *contradictions]
        ):
            kwargs = {"value_model": value_model}
            if error is None:
                trainer = sapo_trainer(family, tmp_path, critic="ladder", trainer_kwargs=kwargs, **settings)
                assert trainer.critic.value_head.ladder.sizes.layers == 3
                continue
            with pytest.raises(ValueError, match=error):
                sapo_trainer(family, tmp_path, critic="ladder", trainer_kwargs=kwargs, **settings)

    @TEXT_FAMILY
    def test_value_model_of_another_kind(self, family, tmp_path):
        policy = family.build_model()
        policy.save_pretrained(tmp_path / "whole")
        for value_model, error in (
            (str(tmp_path / "whole"), "`value_model` is a whole model, but a critic of mode 'ladder' is none"),
            (policy, "`value_model` is a whole model, but a critic of mode 'ladder' is none: leave `value_model` out"),
            (
                SegmentValueHead.from_policy(policy, mode="shared"),
                "is a 'shared' critic, but `critic='ladder'`: set `critic=.shared.`",
            ),
            (SegmentValueHead(24, ladder=LadderSizes(2, 64, 2)), "of size 24, but the policy's have size 16"),
            (SegmentValueHead(16, ladder=LadderSizes(4, 64, 4)), "`critic_reads` is 4, but a policy of 2 layers"),
        ):
            with pytest.raises(ValueError, match=error):
                sapo_trainer(family, tmp_path, critic="ladder", trainer_kwargs={"value_model": value_model})

    @TEXT_FAMILY
    def test_beside_monte_carlo_values(self, family, tmp_path):
        """Continuations are sampled in the middle of a rollout; they feed the critic nothing."""
        diagnostics, recorder = (
            ValueDiagnostics(every=1, num_continuations=2, output_dir=tmp_path / "values"),
            Recorder(),
        )
        trainer = sapo_trainer(
            family, tmp_path, critic="ladder", trainer_kwargs={"callbacks": [diagnostics, recorder]}, max_steps=1
        )
        trainer.train()
        (file,) = (tmp_path / "values").iterdir()
        table, (rollout,) = pd.read_parquet(file), recorder.rollouts
        own = rollout.values[table["response"].to_list(), table["token"].to_list()]
        assert table["value"].to_list() == own.tolist() and table["value"].std() > 0


class TestWarmup:
    @EACH_READER
    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_critic_learns_on_a_frozen_policy(self, family, reader, tmp_path):
        """The policy's forward then keeps nothing for a backward."""
        trainer = reading_trainer(family, tmp_path, reader, critic_warmup_steps=2, optim="sgd", max_steps=2)
        graphs = []
        decoder_layers(trainer.model.base_model)[-1].register_forward_hook(
            lambda _module, _args, output: graphs.append((output if torch.is_tensor(output) else output[0]).grad_fn)
        )
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        trainer.train()
        assert len(graphs) == 4 and set(graphs) == {None}
        assert len(unmoved(policy, trainer.model)) == len(policy)
        assert unmoved(value_head, trainer.critic.value_head) == []

    @TEXT_FAMILY
    def test_its_gradient_is_that_on_a_policy_that_learns(self, family, tmp_path):
        moved = []
        for warmup_steps in (0, 1):
            trainer = reading_trainer(
                family, tmp_path, "ladder", critic_warmup_steps=warmup_steps, optim="sgd", max_steps=1
            )
            trainer.train()
            moved.append(state_of(trainer.critic.value_head))
        for name, tensor in moved[0].items():
            torch.testing.assert_close(moved[1][name], tensor, rtol=0, atol=1e-7, msg=name)


SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "num_hidden_layers": 4, "bos_token_id": None}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR_ATTENTION |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}


def qwen2_vl_config(tokenizer) -> Qwen2VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    return Qwen2VLConfig(text_config={**SIZES, "rope_parameters": rope}, vision_config=vision)


def qwen3_5_config(tokenizer) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(**SIZES, **LINEAR_ATTENTION, pad_token_id=tokenizer.pad_token_id)


@pytest.mark.parametrize(
    ("config", "model_class"),
    [(qwen2_vl_config, Qwen2VLForConditionalGeneration), (qwen3_5_config, Qwen3_5ForCausalLM)],
    ids=["qwen2_vl", "qwen3_5"],
)
def test_other_families(tokenizer, config, model_class, tmp_path):
    """Layers under other names, and layers of unlike kinds: the states are those that transformers itself returns."""
    family = Family("other", tokenizer, config, model_class)
    recorder = Recorder()
    trainer = reading_trainer(family, tmp_path, "ladder", callbacks=[recorder], max_steps=1, learning_rate=0.0)
    before = state_of(trainer.critic.value_head)
    model = trainer.model
    value_head, values, ids = trainer.critic.value_head, [], torch.arange(20, 34).view(2, 7)
    with torch.no_grad(), PolicyReader(value_head, learns=False).tapped(backbone_of(model), ids, values.append):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert value_head.depths(model) == [0, 2, 4]
    assert torch.equal(values[0], value_head(hidden_states=[hidden[depth] for depth in (0, 2, 4)]))
    trainer.train()
    assert unmoved(before, value_head) == [] and recorder.rollouts[0].values.std() > 0


@TEXT_FAMILY
@pytest.mark.parametrize("avoid_padding", [False, True])
def test_values_of_a_rollout_are_those_of_each_row_alone(family, avoid_padding, tmp_path):
    """Whether rows are moved, and which rows run together."""
    recorder = Recorder()
    trainer = reading_trainer(
        family, tmp_path, "ladder", callbacks=[recorder], avoid_padding=avoid_padding, max_steps=1
    )
    trainer.train()
    (rollout,) = recorder.rollouts
    assert not rollout.prompt_mask.all() and not rollout.segments.mask.all()
    trainer = reading_trainer(family, tmp_path, "ladder")  # as it was before its step
    value_head, model = trainer.critic.value_head, trainer.model.eval()
    for row, mask in enumerate(rollout.segments.mask):
        ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row].bool()], rollout.completion_ids[row][mask]])
        with torch.no_grad():
            hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states
            values = value_head(hidden_states=[hidden[depth] for depth in value_head.depths(model)])[0]
        own = values[-1 - int(mask.sum()) : -1]
        torch.testing.assert_close(rollout.values[row][mask], own, rtol=0, atol=2e-5)
