"""One step of plain gradient descent moves policy and critic along the gradients of a plain forward."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sapo_trl import Segments
from tests.testing_utils import (
    Family,
    Recorder,
    WeightRecorder,
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared"])
FAMILIES_AND_CRITICS = pytest.mark.parametrize(
    ("family", "critic"),
    [
        ("qwen2", "separate"),
        ("qwen2", "shared"),
        ("qwen2_5_vl", "separate"),
        pytest.param("qwen2_5_vl", "shared", marks=pytest.mark.slow),
    ],
    indirect=["family"],
)


def qwen3_moe_config(tokenizer) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def gpt2_config(tokenizer) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


class TestGradients:
    """One step of plain gradient descent moves policy and critic along the gradients of a plain forward."""

    @FAMILIES_AND_CRITICS
    def test_update_is_the_gradient_of_the_written_out_loss(self, family, critic, tmp_path):
        recorder, rate = Recorder(), 0.5
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            num_mini_batches=1,
            per_device_train_batch_size=4,
            max_steps=1,
            optim="sgd",
            learning_rate=rate,
            critic_learning_rate=rate,
            max_grad_norm=1e6,
            critic_max_grad_norm=1e6,
            entropy_coef=0.3,
            trainer_kwargs={"callbacks": [recorder], "rollout_func": fixed_rollout(random_completions(5))},
        )
        value_head = trainer.critic.value_head
        before, critic_before = state_of(trainer.model), state_of(value_head)
        trainer.train()
        assert logged(trainer, "entropy_coef") == pytest.approx([0.3])
        (rollout,) = recorder.rollouts
        images = trainer.micro_batches[0].get("pixel_values")

        # The same rollout in the order of the shuffled batch, by transformers' forward with its whole logits.
        batch = trainer.micro_batches[0]
        plain = family.build_model()
        plain.load_state_dict(before)
        inputs = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        }
        if images is not None:
            inputs |= {key: batch[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
        first = batch["prompt_ids"].size(1)
        distribution = torch.log_softmax(plain(**inputs).logits[:, first - 1 : -1], dim=-1)
        logps = distribution.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
        entropies = -(distribution.exp() * distribution).sum(-1)
        mask = batch["completion_mask"].bool()
        # On-policy every ratio is 1, whose gradient is that of the segment's mean log-probability.
        loss = torch.zeros(())
        for row, ids in enumerate(batch["segment_ids"]):
            for segment in range(int(ids.max()) + 1):
                tokens = ids == segment
                advantage = batch["advantages"][row][tokens]
                assert advantage.unique().numel() == 1
                loss = loss - advantage.sum() * logps[row][tokens].mean()
        loss = (loss - 0.3 * entropies[mask].sum()) / mask.sum()
        loss.backward()
        after = dict(trainer.model.named_parameters())
        gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
        moved = flat({name: before[name] - after[name].detach() for name in before})
        expected = rate * flat(gradients)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

        backbone = family.build_model()
        backbone.load_state_dict(before)
        weight = critic_before["head.weight"].clone().requires_grad_()
        bias = critic_before["head.bias"].clone().requires_grad_()
        hidden = backbone.model(**inputs).last_hidden_state[:, first - 1 : -1]
        if critic == "shared":
            hidden = hidden.detach()
        values = hidden @ weight[0] + bias
        states = Segments(batch["segment_ids"]).is_first
        (0.5 * (values - batch["returns"])[states].square().mean()).backward()
        after = dict(value_head.named_parameters())
        expected = {"head.weight": weight.grad, "head.bias": bias.grad}
        if critic == "separate":
            expected |= {f"backbone.{name}": parameter.grad for name, parameter in backbone.model.named_parameters()}
        assert expected.keys() == critic_before.keys()
        moved = flat({name: critic_before[name] - after[name].detach() for name in expected})
        expected = rate * flat(expected)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    @pytest.mark.parametrize(
        ("family", "critic", "from_disk"),
        [
            ("qwen2", "separate", False),
            ("qwen2", "separate", True),
            ("qwen2", "shared", False),
            ("qwen2", "ladder", False),
            ("qwen2_5_vl", "separate", False),
            pytest.param("qwen2_5_vl", "separate", True, marks=pytest.mark.slow),
            pytest.param("qwen2_5_vl", "shared", False, marks=pytest.mark.slow),
        ],
        indirect=["family"],
    )
    def test_gradient_checkpointing_recomputes_and_changes_nothing(self, family, critic, from_disk, tmp_path):
        value_model = None
        if from_disk:  # a model loaded from disk is in evaluation mode
            family.build_model(seed=1).save_pretrained(tmp_path / "value")
            value_model = str(tmp_path / "value")
        runs = {}
        for checkpointing in (False, True):
            trainer = sapo_trainer(
                family,
                tmp_path,
                critic=critic,
                gradient_checkpointing=checkpointing,
                trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5)), "value_model": value_model},
            )
            calls = {"policy": 0, "critic": 0}

            def count(name, calls=calls):
                def hook(*_):
                    calls[name] += torch.is_grad_enabled()

                return hook

            def first_mlp(backbone):
                return getattr(backbone, "language_model", backbone).layers[0].mlp

            first_mlp(trainer.model.model).register_forward_pre_hook(count("policy"))
            if critic == "separate":
                first_mlp(trainer.critic.value_head.backbone).register_forward_pre_hook(count("critic"))
            trainer.train()
            runs[checkpointing] = trainer, calls
        (plain, plain_calls), (saving, saving_calls) = runs[False], runs[True]
        # Each of the two updates runs every layer once, and with checkpointing a second time in the backward pass.
        assert plain_calls == {"policy": 2, "critic": 2 if critic == "separate" else 0}
        assert saving_calls == {name: 2 * number for name, number in plain_calls.items()}
        for one, other in ((plain.model, saving.model), (plain.critic.value_head, saving.critic.value_head)):
            torch.testing.assert_close(flat(state_of(other)), flat(state_of(one)), rtol=1e-5, atol=1e-6)

    @CRITICS
    @pytest.mark.parametrize("disable", [False, True])
    def test_dropout_of_another_architecture(self, tokenizer, critic, disable, tmp_path):
        """GPT-2 ties its head to its embeddings, names its backbone differently and has dropout layers."""
        family = Family("gpt2", tokenizer, gpt2_config, GPT2LMHeadModel)
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            disable_dropout=disable,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
        )
        for module in (trainer.model, trainer.critic.value_head):
            rates = {layer.p for layer in module.modules() if isinstance(layer, torch.nn.Dropout)}
            assert rates <= ({0} if disable else {0.1})
            assert rates or module.mode == "shared"
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        trainer.train()
        assert unmoved(policy, trainer.model) == [] and unmoved(value_head, trainer.critic.value_head) == []

    @CRITICS
    def test_mixture_of_experts_learns_to_balance_its_load(self, tokenizer, critic, tmp_path):
        family = Family("qwen3_moe", tokenizer, qwen3_moe_config, Qwen3MoeForCausalLM)
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            num_mini_batches=1,
            per_device_train_batch_size=4,
            router_aux_loss_coef=0.5,
            beta=0.0,
            max_steps=1,
            trainer_kwargs={"callbacks": [recorder], "rollout_func": fixed_rollout(random_completions(5))},
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        batch = trainer.micro_batches[0]
        with torch.no_grad():
            expected = family.build_model()(
                input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                output_router_logits=True,
            ).aux_loss.item()
        assert rollout.values.isfinite().all() and expected > 1
        difference = logged(trainer, "loss")[0] - logged(trainer, "policy_loss")[0]
        assert difference == pytest.approx(0.5 * expected, rel=1e-4)

    def test_unequal_micro_batches_count_by_their_tokens_in_the_load_of_experts(self, tokenizer, tmp_path):
        def one_long_completion(prompts, trainer):
            return [[30 + row] * (2 if row else 60) for row in range(len(prompts))]

        family = Family("qwen3_moe", tokenizer, qwen3_moe_config, Qwen3MoeForCausalLM)
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic="none",
            num_mini_batches=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            max_completion_length=60,
            router_aux_loss_coef=0.5,
            beta=0.0,
            max_steps=1,
            trainer_kwargs={"rollout_func": fixed_rollout(one_long_completion)},
        )
        trainer.train()
        model, losses, tokens = family.build_model(), [], []
        for batch in trainer.micro_batches:
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            with torch.no_grad():
                loss = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
            losses.append(loss.item())
            tokens.append(mask.sum().item())
        expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert abs(expected - sum(losses) / 2) > 1e-3
        difference = logged(trainer, "loss")[0] - logged(trainer, "policy_loss")[0]
        assert difference == pytest.approx(0.5 * expected, rel=1e-4)

    @TEXT_FAMILY
    @CRITICS
    def test_policy_and_critic_have_their_own_learning_rate_and_clipping(self, family, critic, tmp_path):
        def run(**settings):
            trainer = sapo_trainer(
                family,
                tmp_path,
                critic=critic,
                optim="sgd",
                max_steps=1,
                trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
                **settings,
            )
            before = state_of(trainer.model), state_of(trainer.critic.value_head)
            trainer.train()
            after = state_of(trainer.model), state_of(trainer.critic.value_head)
            return [(flat(new) - flat(old)).norm().item() for old, new in zip(before, after, strict=True)], trainer

        (policy, value), _ = run(learning_rate=0.0)
        assert policy == 0 and value > 0
        (policy, value), _ = run(critic_learning_rate=0.0)
        assert policy > 0 and value == 0
        (policy, value), trainer = run(
            learning_rate=1.0, critic_learning_rate=2.0, max_grad_norm=1e-2, critic_max_grad_norm=1e-3
        )
        assert policy == pytest.approx(1e-2, rel=1e-2) and value == pytest.approx(2e-3, rel=1e-2)
        # Logged are the norms before clipping.
        assert logged(trainer, "grad_norm")[0] > 0.1 and logged(trainer, "critic/grad_norm")[0] > 0.1
        (policy, value), trainer = run(max_grad_norm=1e6, critic_max_grad_norm=math.inf)
        assert policy == pytest.approx(0.1 * logged(trainer, "grad_norm")[0], rel=1e-3)
        assert value == pytest.approx(0.1 * logged(trainer, "critic/grad_norm")[0], rel=1e-3)

    @TEXT_FAMILY
    def test_weight_decay_spares_biases_and_norms(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, weight_decay=0.1)
        names = {id(parameter): name for name, parameter in trainer.critic.value_head.named_parameters()}
        decayed, spared = trainer.critic.optimizer.param_groups
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
        assert {names[id(p)] for p in spared["params"]} == {n for n in names.values() if "bias" in n or "norm" in n}
        assert len(decayed["params"]) + len(spared["params"]) == len(names)
        trainer = sapo_trainer(family, tmp_path, weight_decay=0.1, critic_weight_decay=0.3)
        assert trainer.critic.optimizer.param_groups[0]["weight_decay"] == 0.3

    @TEXT_FAMILY
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, [1.0, 1.0, 1.0, 1.0]),
            ({"critic_lr_warmup_steps": 2}, [0.0, 0.5, 1.0, 1.0]),
            ({"critic_lr_scheduler_type": "linear"}, [1.0, 0.75, 0.5, 0.25]),
            ({"critic_lr_scheduler_type": "linear", "critic_lr_warmup_steps": 2}, [0.0, 0.5, 1.0, 0.5]),
            ({"lr_scheduler_type": "linear"}, [1.0, 0.75, 0.5, 0.25]),
            ({"lr_scheduler_type": "linear", "critic_lr_scheduler_type": "constant"}, [1.0] * 4),
            (
                {
                    "lr_scheduler_type": "cosine_with_min_lr",
                    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                    "critic_lr_scheduler_type": "linear",
                },
                [1.0, 0.75, 0.5, 0.25],
            ),
        ],
    )
    def test_schedule_of_the_critic(self, family, settings, expected, tmp_path):
        # All of one rollout.
        run = {"max_steps": 4, "num_mini_batches": 4, "per_device_train_batch_size": 1}
        trainer = sapo_trainer(family, tmp_path, critic_learning_rate=0.02, **run, **settings)
        trainer.train()
        assert logged(trainer, "critic/learning_rate") == pytest.approx([0.02 * factor for factor in expected])

    @FAMILIES_AND_CRITICS
    def test_critic_warm_up_leaves_the_policy_alone(self, family, critic, tmp_path):
        trainer = sapo_trainer(
            family, tmp_path, critic=critic, critic_warmup_steps=2, max_steps=4, weight_decay=0.1, num_mini_batches=1
        )
        value_head = trainer.critic.value_head
        states = [[state_of(trainer.model), state_of(value_head)]]
        recorder = WeightRecorder(trainer.model, value_head)
        trainer.add_callback(recorder)
        trainer.train()
        states += recorder.states
        for step in range(4):
            (policy, critic_state), (new_policy, new_critic_state) = states[step], states[step + 1]
            same = [name for name in policy if torch.equal(policy[name], new_policy[name])]
            assert same == (list(policy) if step < 2 else [])
            assert not any(torch.equal(critic_state[name], new_critic_state[name]) for name in critic_state)
        assert len(logged(trainer, "critic/loss")) == 4 and len(logged(trainer, "policy_loss")) == 2
