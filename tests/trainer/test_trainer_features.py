"""What `GRPOTrainer` offers keeps working, and the settings of our own do what they say."""

import json
import math

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.chat_template_utils import qwen3_chat_template

from sapo_trl import SAPOTrainer, Segments
from sapo_trl.embedded import build_tokenizer
from sapo_trl.foreign_text import visible
from tests.testing_utils import (
    FAMILIES,
    Family,
    Recorder,
    WeightRecorder,
    fixed_rollout,
    length_reward,
    logged,
    random_completions,
    sapo_config,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
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
        assert logged(trainer, "grad_norm")[0] > 0.1 and logged(trainer, "critic_grad_norm")[0] > 0.1
        (policy, value), trainer = run(max_grad_norm=1e6, critic_max_grad_norm=math.inf)
        assert policy == pytest.approx(0.1 * logged(trainer, "grad_norm")[0], rel=1e-3)
        assert value == pytest.approx(0.1 * logged(trainer, "critic_grad_norm")[0], rel=1e-3)

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
        assert logged(trainer, "critic_lr") == pytest.approx([0.02 * factor for factor in expected])

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
        assert len(logged(trainer, "value_loss")) == 4 and len(logged(trainer, "policy_loss")) == 2


class TestReference:
    @TEXT_FAMILY
    def test_none(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.0)
        trainer.train()
        assert trainer.ref_model is None and "kl" not in trainer.state.log_history[0]

    @BOTH_FAMILIES
    def test_frozen_copy_of_a_model_in_memory(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.1, max_steps=4)
        reference = state_of(trainer.ref_model)
        expected = state_of(family.build_model())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in reference.items())
        assert not {p.data_ptr() for p in trainer.ref_model.parameters()} & {
            p.data_ptr() for p in trainer.model.parameters()
        }
        assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
        assert trainer.beta == trainer.args.beta == 0.1
        trainer.train()
        assert len(unmoved(reference, trainer.ref_model)) == len(reference)
        first, second = logged(trainer, "kl")
        assert first == 0.0 and abs(second) > 1e-3

    @TEXT_FAMILY
    def test_loaded_by_name_is_the_same(self, family, tmp_path):
        family.build_model().save_pretrained(tmp_path / "model")
        runs = {}
        for name, model in (("memory", family.build_model()), ("disk", str(tmp_path / "model"))):
            trainer = sapo_trainer(
                family,
                tmp_path / name,
                model=model,
                beta=0.1,
                max_steps=4,
                trainer_kwargs={
                    "rollout_func": fixed_rollout(random_completions(5)),
                    "value_model": family.build_model(),
                },
            )
            trainer.train()
            runs[name] = logged(trainer, "kl")
        assert runs["disk"][0] == 0.0 and abs(runs["disk"][1]) > 1e-3
        assert runs["disk"] == pytest.approx(runs["memory"], rel=1e-4)

    @TEXT_FAMILY
    def test_synchronised_reference_needs_a_name(self, family, tmp_path):
        with pytest.raises(ValueError, match="`sync_ref_model=True`.*save this one first"):
            sapo_trainer(family, tmp_path, beta=0.1, sync_ref_model=True)

    @pytest.mark.parametrize(
        ("family", "critic"),
        [
            ("qwen2", "separate"),
            ("qwen2", "shared"),
            ("qwen2", "none"),
            pytest.param("qwen2_5_vl", "separate", marks=pytest.mark.slow),
            ("qwen2_5_vl", "shared"),
            pytest.param("qwen2_5_vl", "none", marks=pytest.mark.slow),
        ],
        indirect=["family"],
    )
    def test_adapter_switched_off(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            beta=0.1,
            max_steps=4,
            temperature=0.9,
            trainer_kwargs={
                "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(random_completions(5)),
            },
        )
        assert trainer.ref_model is None
        before = state_of(trainer.model)
        critic_before = state_of(trainer.critic.value_head) if trainer.critic else {}
        assert not any("lora" in name for name in critic_before)
        trainer.train()
        trained = {name for name in before if "lora" in name}
        assert set(unmoved(before, trainer.model)) == before.keys() - trained
        if trainer.critic:
            assert unmoved(critic_before, trainer.critic.value_head) == []

        # The KL of the second rollout, against the plain model that the adapter was put on.
        if family.takes_images:
            return
        rollout, plain = recorder.rollouts[1], family.build_model()
        differences = []
        for row in range(4):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
            completion = rollout.completion_ids[row][rollout.segments.mask[row]]
            with torch.no_grad():
                logits = plain(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / 0.9
            logps = torch.log_softmax(logits, -1).gather(1, completion.unsqueeze(1)).squeeze(1)
            differences.append(rollout.logps[row][: len(completion)] - logps)
        expected = torch.cat(differences).mean().item()
        assert abs(expected) > 1e-3
        assert logged(trainer, "kl") == pytest.approx([0.0, expected], abs=1e-4)


class TestRewards:
    @TEXT_FAMILY
    def test_async_rewards(self, family, tmp_path):
        async def score(completion_ids, **kwargs):
            return length_reward(completion_ids)

        recorder = Recorder()
        trainer = sapo_trainer(
            family, tmp_path, trainer_kwargs={"reward_funcs": [score, length_reward], "callbacks": [recorder]}
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        expected = [2 * reward for reward in length_reward(rollout.completion_ids.tolist())]
        assert rollout.rewards.tolist() == pytest.approx(expected)
        assert logged(trainer, "rewards/score/mean") == pytest.approx([sum(expected) / 8])

    @TEXT_FAMILY
    @CRITICS
    def test_response_that_nothing_scored_takes_no_part(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            trainer_kwargs={
                "reward_funcs": [
                    lambda completions, **kwargs: [1.0, None, None, 0.0],
                    lambda completions, **kwargs: [None, None, 0.5, None],
                ],
                "callbacks": [recorder],
            },
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        assert rollout.rewards.isnan().tolist() == [False, True, False, False]
        assert rollout.rewards[[0, 2, 3]].tolist() == [1.0, 0.5, 0.0]
        assert (rollout.segments.count == 0).tolist() == [False, True, False, False]
        for tensor in (rollout.advantages, rollout.returns, rollout.token_rewards):
            assert tensor[1].abs().max() == 0
            assert tensor.isfinite().all()
        for module in (trainer.model, trainer.critic.value_head):
            assert all(parameter.isfinite().all() for parameter in module.parameters())

    @TEXT_FAMILY
    def test_extra_columns_reach_the_reward_function(self, family, tmp_path):
        seen = []

        def score(completions, answer, log_metric, **kwargs):
            seen.extend(answer)
            log_metric("my_metric", 3.0)
            return [float(x) for x in answer]

        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"reward_funcs": score})
        trainer.train()
        assert len(seen) == 4 and set(seen) <= set(family.dataset()["answer"])
        assert logged(trainer, "my_metric") == [3.0]
        assert logged(trainer, "reward") == pytest.approx([sum(map(float, seen)) / 4])


class TestRollouts:
    @TEXT_FAMILY
    def test_holes_of_env_mask_carry_nothing(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            beta=0.1,
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(
                    lambda prompts, _: [list(range(30, 38))] * len(prompts),
                    env_mask=lambda prompts, completions: [[1, 1, 0, 0, 1, 1, 1, 0]] * len(prompts),
                ),
            },
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        holes = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1]).bool()
        assert torch.equal(rollout.segments.mask, ~holes.expand(4, 8))
        for tensor in (rollout.advantages, rollout.returns, rollout.token_rewards):
            assert tensor[:, holes].abs().max() == 0
        # The outcome's reward is on the last token of the policy's own.
        rewards = torch.tensor(length_reward([list(range(30, 38))] * 4))
        assert torch.allclose(rollout.token_rewards[:, 6], rewards)
        # Holes are 37.5 % of the tokens: means over tokens leave them out.
        assert logged(trainer, "completions/mean_length") == [5.0]

    @pytest.mark.parametrize(
        ("family", "shuffled"),
        [
            ("qwen2", False),
            ("qwen2", True),
            pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
            ("qwen2_5_vl", True),
        ],
        indirect=["family"],
    )
    def test_iterable_data_set(self, family, shuffled, tmp_path):
        recorder, dataset = Recorder(), family.dataset(8)
        trainer = sapo_trainer(
            family,
            tmp_path,
            shuffle_dataset=shuffled,
            max_steps=4,
            trainer_kwargs={"train_dataset": dataset.to_iterable_dataset(), "callbacks": [recorder]},
        )
        policy = state_of(trainer.model)
        trainer.train()
        assert unmoved(policy, trainer.model) == []
        texts = [
            trainer.tokenizer.decode(ids[mask.bool()])
            for rollout in recorder.rollouts
            for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        ]
        assert len(texts) == 8
        if not shuffled:
            questions = [json.dumps(row["prompt"], default=str) for row in dataset]
            for text, question in zip(texts, questions, strict=True):
                assert text.split("Find ")[1].split(".")[0] in question

    @TEXT_FAMILY
    def test_several_generations_and_iterations(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            num_generations=4,
            num_iterations=2,
            per_device_train_batch_size=4,
            max_steps=8,
            trainer_kwargs={"callbacks": [recorder]},
        )
        trainer.train()
        # Two mini-batches, each seen twice, per rollout.
        assert recorder.steps == [0, 4]
        for rollout in recorder.rollouts:
            prompts = [tuple(row) for row in rollout.prompt_ids.tolist()]
            assert prompts[0:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4 and prompts[0] != prompts[4]
            assert len({tuple(row) for row in rollout.completion_ids.tolist()}) > 4
        # Off-policy in the second iteration, on-policy in the first step after each rollout.
        ratios = logged(trainer, "ratio/max")
        assert ratios[0] == pytest.approx(1.0, abs=1e-5) and ratios[4] == pytest.approx(1.0, abs=1e-5)
        assert max(ratios[1:4]) > 1.1

    @TEXT_FAMILY
    @pytest.mark.parametrize("shape", ["token", "sequence"])
    def test_importance_correction_of_the_sampler_weighs_the_tokens(self, family, shape, tmp_path):
        """vLLM's correction arrives under this key, `(B, T)` or `(B, 1)`."""
        trainer = sapo_trainer(
            family,
            tmp_path,
            learning_rate=0.0,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
        )
        trainer.train()
        trainer.model.train()
        batch = trainer.micro_batches[0]
        mask = batch["completion_mask"]
        torch.manual_seed(0)
        weights = torch.rand(mask.shape if shape == "token" else (len(mask), 1)) + 0.5
        plain = trainer.policy_loss(trainer.model, batch)
        batch["importance_sampling_ratio"] = weights
        weighted = trainer.policy_loss(trainer.model, batch)
        # The weights have not moved since the rollout, so every ratio is 1.
        losses = -batch["advantages"] * mask
        torch.testing.assert_close(plain, losses.sum() / mask.sum())
        torch.testing.assert_close(weighted, (losses * weights).sum() / mask.sum())
        assert (weighted - plain).abs() > 1e-3


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment whose reward is how often it was asked to count, and by how much."""

    def __init__(self):
        self.total = 0

    def reset(self, **kwargs):
        self.total = 0

    def count(self, by: int) -> int:
        """
        Count on.

        Args:
            by: How far.
        """
        self.total += by
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


class Echo:
    """An environment whose reward is the length of what it was told."""

    def reset(self, **kwargs):
        self.told = ""

    def shout(self, text: str) -> str:
        """
        Say it louder.

        Args:
            text: What to say.
        """
        self.told = text
        return text + "!"

    def get_reward(self) -> float:
        return float(len(self.told))


class TestTools:
    ANSWER = "It is done.<|im_end|>"

    @pytest.fixture
    def tool_family(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = qwen3_chat_template
        return FAMILIES["qwen2"](tokenizer)

    def script_generation(self, trainer: SAPOTrainer, turns: list[list[str]]) -> list[list[list[int]]]:
        """Let the policy say these texts, turn by turn, instead of what it would sample."""
        tokenizer = trainer.tokenizer
        ids = [[tokenizer.encode(text) for text in texts] for texts in turns]
        remaining = iter(ids)

        def generate(input_ids, **kwargs):
            rows = next(remaining)
            assert len(rows) == len(input_ids)
            length = max(map(len, rows))
            padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

        trainer.model.generate = generate
        return ids

    def check_masks(self, trainer, rollout, said: list[list[int]], heard: list[str | None]):
        """What the policy said is in segments, and what it heard is not."""
        for row, (ids, text) in enumerate(zip(said, heard, strict=True)):
            mask, completion = rollout.segments.mask[row], rollout.completion_ids[row]
            assert completion[mask].tolist() == ids
            # Up to the last token that the policy said; what follows is padding.
            last = int(mask.nonzero().max())
            between = trainer.tokenizer.decode(completion[: last + 1][~mask[: last + 1]])
            if text is None:
                assert between == ""
            else:
                assert f"<tool_response>\n{text}\n</tool_response>" in between
            assert rollout.advantages[row][~mask].abs().max() == 0
            assert rollout.token_rewards[row].nonzero().flatten().tolist() in ([], [last])

    @pytest.mark.parametrize("critic", ["separate", "shared"])
    def test_tool_tokens_are_masked(self, tool_family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            critic=critic,
            max_completion_length=200,
            beta=0.0,
            trainer_kwargs={"tools": [multiply], "callbacks": [recorder]},
        )
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call><|im_end|>'
        first, second = self.script_generation(
            trainer, [[call, self.ANSWER, call, self.ANSWER], [self.ANSWER, self.ANSWER]]
        )
        policy = state_of(trainer.model)
        trainer.train()
        said = [first[0] + second[0], first[1], first[2] + second[1], first[3]]
        self.check_masks(trainer, recorder.rollouts[0], said, ["42", None, "42", None])
        assert logged(trainer, "tools/call_frequency") == [0.5]
        assert unmoved(policy, trainer.model) == []

    def test_environment(self, tool_family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            trainer_kwargs={"environment_factory": Counter, "reward_funcs": None, "callbacks": [recorder]},
        )

        def call(by):
            return f'<tool_call>\n{{"name": "count", "arguments": {{"by": {by}}}}}\n</tool_call><|im_end|>'

        first, second = self.script_generation(
            trainer, [[call(3), call(5), self.ANSWER, call(8)], [self.ANSWER, self.ANSWER, self.ANSWER]]
        )
        trainer.train()
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3] + second[2]]
        self.check_masks(trainer, recorder.rollouts[0], said, ["3", "5", None, "8"])
        assert recorder.rollouts[0].rewards.tolist() == [3.0, 5.0, 0.0, 8.0]
        assert logged(trainer, "rewards/Counter/mean") == [4.0]

    def test_environment_may_bring_the_prompts(self, tool_family, tmp_path):
        class Asking(Counter):
            def reset(self, **kwargs):
                super().reset()
                return "Find AB."

        recorder = Recorder()
        trainer = SAPOTrainer(
            model=tool_family.build_model(),
            args=sapo_config(tmp_path),
            processing_class=tool_family.tokenizer,
            environment_factory=Asking,
            callbacks=[recorder],
        )
        trainer.train()
        assert "Find AB." in trainer.tokenizer.decode(recorder.rollouts[0].prompt_ids[0])

    @pytest.fixture
    def routed(self, tool_family):
        rows = tool_family.dataset()
        return rows.add_column("environment", ["counter", "echo"] * (len(rows) // 2))

    def test_several_environments(self, tool_family, routed, tmp_path):
        """Each row has the tools and the reward of the environment that it names."""
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            shuffle_dataset=False,
            max_steps=1,
            trainer_kwargs={
                "environment_factory": {"counter": Counter, "echo": Echo},
                "reward_funcs": None,
                "train_dataset": routed,
                "callbacks": [recorder],
            },
        )

        def call(name, argument):
            call = {"name": name, "arguments": argument}
            return f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>"

        turns = [call("count", {"by": 3}), call("shout", {"text": "AB"}), self.ANSWER, call("count", {"by": 1})]
        first, second = self.script_generation(trainer, [turns, [self.ANSWER] * 3])
        trainer.train()
        (rollout,) = recorder.rollouts
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3] + second[2]]
        for row, ids in enumerate(said):
            assert rollout.completion_ids[row][rollout.segments.mask[row]].tolist() == ids
        heard = [trainer.tokenizer.decode(ids) for ids in rollout.completion_ids]
        assert "<tool_response>\n3\n" in heard[0] and "<tool_response>\nAB!\n" in heard[1]
        # The last row is the echo's, which knows no `count`.
        assert "error" in heard[3] and "<tool_response>\n1\n" not in heard[3]
        assert rollout.rewards.tolist() == [3.0, 2.0, 0.0, 0.0]
        prompts = [trainer.tokenizer.decode(ids) for ids in rollout.prompt_ids]
        assert ['"shout"' in prompt for prompt in prompts] == [False, True, False, True]

    def test_an_environment_that_nobody_knows(self, tool_family, routed, tmp_path):
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            trainer_kwargs={
                "environment_factory": {"counter": Counter, "other": Echo},
                "reward_funcs": None,
                "train_dataset": routed,
            },
        )
        with pytest.raises(ValueError, match="`environment='echo'`, which is not among the environments"):
            trainer.train()

    def test_calls_that_cannot_be_made(self, tool_family, tmp_path):
        """The policy hears why, is trained on what it said, and the failures are counted."""
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            max_steps=1,
            trainer_kwargs={"tools": [multiply], "callbacks": [recorder]},
        )
        calls = ['{"name": "multiply", "arguments": {"a": 6}}', '{"name": "divide", "arguments": {"a": 6, "b": 3}}']
        calls = [f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in calls]
        unread = "<tool_call>\n{not json\n</tool_call><|im_end|>"
        first, second = self.script_generation(trainer, [[*calls, unread, self.ANSWER], [self.ANSWER] * 2])
        trainer.train()
        (rollout,) = recorder.rollouts
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3]]
        for row, ids in enumerate(said):
            assert rollout.completion_ids[row][rollout.segments.mask[row]].tolist() == ids
        heard = [trainer.tokenizer.decode(ids) for ids in rollout.completion_ids]
        assert "error" in heard[0] and "error" in heard[1]
        assert logged(trainer, "tools/failure_frequency") == [1.0]

    def test_infinite_reward_of_an_environment(self, tool_family, tmp_path):
        class Broken(Counter):
            def get_reward(self):
                return math.inf

        trainer = sapo_trainer(
            tool_family, tmp_path, trainer_kwargs={"environment_factory": Broken, "reward_funcs": None}
        )
        with pytest.raises(ValueError, match="`Broken` returned inf for completion 0 of 4"):
            trainer.train()


class TestSegmentation:
    TEXT = "Step 1: AB=3\nStep 2: BC=4\n\nSo 7."

    def segment_texts(self, family, folder, **settings):
        recorder = Recorder()
        ids = family.tokenizer.encode(self.TEXT)
        trainer = sapo_trainer(
            family,
            folder,
            max_completion_length=len(ids),
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(lambda prompts, _: [ids] * len(prompts)),
            },
            **settings,
        )
        trainer.train()
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        rollout = recorder.rollouts[0]
        row = rollout.segments.ids[0]
        texts = [
            family.tokenizer.decode(rollout.completion_ids[0][row == m]) for m in range(int(rollout.segments.count[0]))
        ]
        assert "".join(texts) == self.TEXT
        return texts, rollout

    @TEXT_FAMILY
    def test_newline(self, family, tmp_path):
        texts, _ = self.segment_texts(family, tmp_path, segmentation="newline")
        assert texts == ["Step 1: AB=3\n", "Step 2: BC=4\n\n", "So 7."]

    @TEXT_FAMILY
    def test_step(self, family, tmp_path):
        texts, _ = self.segment_texts(family, tmp_path, segmentation="step")
        assert texts == ["Step 1: AB=3\n", "Step 2: BC=4\n\nSo 7."]
        texts, _ = self.segment_texts(family, tmp_path, segmentation="step", step_pattern="So")
        assert texts == ["Step 1: AB=3\nStep 2: BC=4\n\n", "So 7."]

    @TEXT_FAMILY
    def test_token_and_sequence(self, family, tmp_path):
        texts, rollout = self.segment_texts(family, tmp_path, segmentation="token")
        assert len(texts) == rollout.completion_ids.size(1)
        assert self.segment_texts(family, tmp_path, segmentation="sequence")[0] == [self.TEXT]

    @TEXT_FAMILY
    @pytest.mark.parametrize("cut", ["end", "start"])
    def test_entropy_and_probability(self, family, cut, tmp_path):
        length = len(family.tokenizer.encode(self.TEXT))
        for settings, count, score in (
            ({"segmentation": "entropy", "top_percent": 25.0}, math.ceil(length / 4), "entropies"),
            ({"segmentation": "probability", "num_cuts": 3}, 3, "logps"),
        ):
            _, rollout = self.segment_texts(family, tmp_path, segment_cut=cut, **settings)
            scores = getattr(rollout, score)[0] * (1 if score == "entropies" else -1)
            selected = set(scores.topk(count).indices.tolist())
            if cut == "end":
                marked = set(rollout.segments.is_last[0].nonzero().flatten().tolist())
                assert marked == selected | {length - 1}
            else:
                marked = set(rollout.segments.is_first[0].nonzero().flatten().tolist())
                assert marked == selected | {0}

    @TEXT_FAMILY
    def test_any_callable(self, family, tmp_path):
        seen = []

        def halves(entropies, mask):
            seen.append((entropies, mask))
            middle = torch.arange(mask.size(1)) == mask.size(1) // 2
            return Segments.from_last_tokens(middle.expand_as(mask), mask)

        recorder = Recorder()
        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": halves, "callbacks": [recorder]})
        trainer.train()
        assert recorder.rollouts[0].segments.count.tolist() == [2] * 4
        # Once per rollout, of the policy that produced it.
        assert len(seen) == 1
        assert torch.equal(seen[0][0], recorder.rollouts[0].entropies) and seen[0][1].all()

    @TEXT_FAMILY
    def test_further_inputs_by_name(self, family, tmp_path):
        seen = {}

        def with_some(entropies, mask, completion_ids):
            seen["some"] = {"completion_ids"}
            assert completion_ids.shape == mask.shape
            return Segments.from_last_tokens(mask, mask)

        def with_all(entropies, mask, **kwargs):
            seen["all"] = kwargs.keys()
            return Segments.from_last_tokens(mask, mask)

        for segmenter in (with_some, with_all):
            sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": segmenter}).train()
        assert seen == {"some": {"completion_ids"}, "all": {"logps", "completion_ids", "tokenizer"}}


def completions_tables(family, tmp_path, **trainer_kwargs):
    """The rollouts of a short training, each with the table that was logged of it."""
    recorder = Recorder()
    trainer_kwargs["callbacks"] = [recorder]
    settings = {"max_steps": 4, "log_completions": True, "num_completions_to_print": 1}
    sapo_trainer(family, tmp_path, **settings, trainer_kwargs=trainer_kwargs).train()
    tables = [pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet") for step in (1, 3)]
    return zip(recorder.rollouts, tables, strict=True)


class TestLogs:
    @BOTH_FAMILIES
    def test_completions_table_has_the_mean_token_advantage(self, family, tmp_path):
        for rollout, table in completions_tables(family, tmp_path, rollout_func=fixed_rollout(random_completions(5))):
            expected = [
                (row.sum() / mask.sum()).item()
                for row, mask in zip(rollout.advantages, rollout.segments.mask, strict=True)
            ]
            assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-6)
            assert table["length_reward"].tolist() == pytest.approx(rollout.rewards.tolist())
            assert max(map(abs, expected)) > 0.1  # GRPO's would be 0 with one generation per prompt

    @TEXT_FAMILY
    def test_completions_table_has_the_segments(self, family, tmp_path):
        tables = completions_tables(
            family,
            tmp_path,
            # The first response has no reward, the others a token that a tool wrote.
            reward_funcs=lambda completions, **kwargs: [None, 0.0, 1.0, 0.5],
            rollout_func=fixed_rollout(
                random_completions(5, min_length=4),
                env_mask=lambda prompts, completions: [[1, 0] + [1] * (len(row) - 2) for row in completions],
            ),
        )
        decode = family.tokenizer.decode
        for rollout, table in tables:
            assert table["segments/text"][0] == "" and len(table["segments/advantages"][0]) == 0
            for row in range(1, 4):
                pieces, means = {}, {}
                for token, segment, advantage in zip(
                    rollout.completion_ids[row].tolist(),
                    rollout.segments.ids[row].tolist(),
                    rollout.advantages[row].tolist(),
                    strict=True,
                ):
                    if segment >= 0:
                        pieces.setdefault(segment, []).append(token)
                        means.setdefault(segment, []).append(advantage)
                assert len(pieces) > 1
                assert table["segments/text"][row] == "│".join(visible(decode(ids)) for ids in pieces.values())
                expected = [sum(values) / len(values) for values in means.values()]
                assert table["segments/advantages"][row] == pytest.approx(expected, abs=1e-4)

    @TEXT_FAMILY
    def test_completions_table_after_a_smaller_evaluation_batch(self, family, tmp_path):
        """TRL's table keeps as many rows as a rollout has: the older ones keep their advantages."""
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            log_completions=True,
            num_completions_to_print=1,
            per_device_eval_batch_size=2,
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(random_completions(5)),
                "eval_dataset": family.dataset(2),
            },
        )
        trainer.train()
        trainer.evaluate()
        training, evaluation = (
            (rollout.advantages.sum(1) / rollout.segments.mask.sum(1)).tolist() for rollout in recorder.rollouts
        )
        table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
        assert table["advantage"].tolist() == pytest.approx(training[2:] + evaluation, abs=1e-6)

    @TEXT_FAMILY
    def test_every_metric_is_there(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.1)
        trainer.train()
        first = trainer.state.log_history[0]
        names = """reward completions/mean_length entropy policy_loss clip_ratio/low_mean clip_ratio/high_mean
            clip_ratio/dual_mean approx_kl value_loss value/explained_variance grad_norm critic_grad_norm kl
            segments/count segments/length segments/max_length segments/single_token_share segments/entropy_at_cuts
            segments/entropy_elsewhere segments/value_change_at_cuts segments/value_change_elsewhere
            time/generate time/score time/value time/reward time/update critic_lr"""
        assert not [name for name in names.split() if not math.isfinite(first[name])]
        assert all(first[name] > 0 for name in first if name.startswith("time/"))
        assert first["loss"] == pytest.approx(first["policy_loss"], abs=1e-6)

    @TEXT_FAMILY
    def test_logged_means_over_several_steps(self, family, tmp_path):
        runs = {}
        for every in (1, 2):
            trainer = sapo_trainer(
                family,
                tmp_path,
                max_steps=4,
                logging_steps=every,
                trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
            )
            trainer.train()
            runs[every] = trainer
        for name in ("policy_loss", "value_loss", "critic_grad_norm", "entropy"):
            one = logged(runs[1], name)
            means = [(one[0] + one[1]) / 2, (one[2] + one[3]) / 2]
            assert logged(runs[2], name) == pytest.approx(means, abs=1e-6), name

    @TEXT_FAMILY
    def test_log_metrics_of_training_scripts_is_transformers_own(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        trainer.log_metrics("train", {"train_loss": 0.5})
        trainer.save_metrics("train", {"train_loss": 0.5})
        assert json.loads((tmp_path / "train_results.json").read_text()) == {"train_loss": 0.5}

    @TEXT_FAMILY
    def test_a_checkpoint_comes_with_the_model_card(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, save_strategy="steps", save_steps=2)
        trainer.train()
        card = (tmp_path / "README.md").read_text()
        assert "2605.01327" in card and "Segment-Aligned Policy Optimization" in card
        assert "- sapo" in card and "- trl" in card
        citations = card[card.index("## Citations") :]
        assert "gao2026segment" in citations and "2511.20347" not in citations  # Qwen's SAPO is another one
        assert "| `value_loss` |" in card


class TestEvaluation:
    @BOTH_FAMILIES
    @CRITICS
    def test_metrics_are_there_and_nothing_moves(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            per_device_eval_batch_size=4,
            num_generations_eval=2,
            trainer_kwargs={"eval_dataset": family.dataset(4), "callbacks": [recorder]},
        )
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        metrics = trainer.evaluate()
        assert len(unmoved(policy, trainer.model)) == len(policy)
        assert len(unmoved(value_head, trainer.critic.value_head)) == len(value_head)
        names = "loss reward policy_loss value/mean value/explained_variance segments/count entropy time/generate kl"
        logs = trainer.state.log_history[-1]
        assert all(math.isfinite(logs[f"eval_{name}"]) for name in names.split())
        assert math.isfinite(metrics["eval_loss"])
        assert {rollout.mode for rollout in recorder.rollouts} == {"eval"}
        assert sum(len(rollout.rewards) for rollout in recorder.rollouts) == 8
        rewards = torch.cat([rollout.rewards for rollout in recorder.rollouts])
        assert logs["eval_reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)

    @TEXT_FAMILY
    @CRITICS
    @pytest.mark.parametrize("warm_up", [0, 1])
    def test_evaluation_between_mini_batches_changes_nothing(self, family, critic, warm_up, tmp_path):
        """Nor does it leak into the training log."""
        runs = []
        for evaluate in (False, True):
            trainer = sapo_trainer(
                family,
                tmp_path,
                critic=critic,
                critic_warmup_steps=warm_up,
                per_device_eval_batch_size=2,
                eval_strategy="steps" if evaluate else "no",
                eval_steps=1,
                trainer_kwargs={
                    "eval_dataset": family.dataset(4),
                    "rollout_func": fixed_rollout(random_completions(5)),
                },
            )
            trainer.train()
            runs.append(trainer)
        assert len(logged(runs[1], "eval_reward")) == 2
        for one, other in ((runs[0].model, runs[1].model), (runs[0].critic.value_head, runs[1].critic.value_head)):
            assert torch.equal(flat(state_of(one)), flat(state_of(other)))
        for name in ("policy_loss", "value_loss", "reward", "segments/count", "critic_grad_norm"):
            assert logged(runs[0], name) == logged(runs[1], name), name

    @TEXT_FAMILY
    def test_critic_is_in_the_mode_of_the_policy(self, family, tmp_path):
        """Dropout acts in training only, in both."""
        model = family.build_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            model=model,
            per_device_eval_batch_size=4,
            trainer_kwargs={
                "eval_dataset": family.dataset(4),
                "rollout_func": fixed_rollout(random_completions(5)),
                "callbacks": [recorder],
            },
        )
        trainer.evaluate()
        trainer.evaluate()
        one, other = recorder.rollouts
        assert torch.equal(one.values, other.values) and torch.equal(one.logps, other.logps)
        trainer.model.train()
        with torch.no_grad():
            batch = {
                "prompt_ids": one.prompt_ids,
                "prompt_mask": one.prompt_mask,
                "completion_ids": one.completion_ids,
                "completion_mask": one.segments.mask.long(),
            }
            values = trainer.critic_forward(trainer.critic.module, batch)
        assert (values - one.values)[one.segments.mask].abs().max() > 1e-3
