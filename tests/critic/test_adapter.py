"""A critic that is a second adapter on the policy's base model: values, gradients, switching, saving."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sapo_trl import SAPOTrainer, SegmentValueHead
from sapo_trl.critic.adapter import CriticAdapter
from sapo_trl.trainer.trl.resume import complete_load
from tests.testing_utils import WeightRecorder, fixed_rollout, logged, random_completions, sapo_trainer, state_of


FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}


def adapter_trainer(family, output_dir, model=None, trainer_kwargs=None, **settings) -> SAPOTrainer:
    kwargs = {"peft_config": LoraConfig(**LORA)} if model is None or not isinstance(model, PeftModel) else {}
    return sapo_trainer(
        family,
        output_dir,
        model=model,
        trainer_kwargs={"rollout_func": fixed_rollout(random_completions()), **kwargs, **(trainer_kwargs or {})},
        **{"critic": "adapter", **settings},
    )


def parameters_by_owner(policy: PeftModel) -> dict[str, dict[str, torch.Tensor]]:
    owners: dict[str, dict[str, torch.Tensor]] = {"critic": {}, "default": {}, "base": {}}
    for name, tensor in state_of(policy).items():
        owner = next((owner for owner in ("critic", "default") if f".{owner}." in name), "base")
        owners[owner][name] = tensor
    return owners


def randomized(policy: PeftModel, seed: int = 0) -> PeftModel:
    """With adapters that do something: LoRA starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return policy


def switches(policy: PeftModel) -> dict[str, Any]:
    """Everything that a switch sets: adapters that are active, and parameters that require a gradient."""
    found: dict[str, Any] = {"policy": policy.active_adapter, "tuner": policy.base_model.active_adapter}
    for name, module in policy.named_modules():
        if hasattr(module, "_active_adapter"):
            found[name] = list(module.active_adapters)
    return found | {name: parameter.requires_grad for name, parameter in policy.named_parameters()}


class TestValues:
    @FAMILIES
    def test_they_are_those_of_a_model_with_the_critics_adapter_merged(self, family, tmp_path):
        """And the policy's log-probabilities those of a model with the policy's."""
        trainer = adapter_trainer(family, tmp_path)
        policy = randomized(trainer.accelerator.unwrap_model(trainer.model))
        head = trainer.critic.value_head
        rows = list(trainer.train_dataset.select(range(4)))
        prompts = trainer.tokenized_prompts(rows)
        batch = prompts.model_inputs(range(4), [[30, 31], [40], [50, 51, 52], [60]], 0, torch.device("cpu"))
        with torch.no_grad():
            values = trainer.critic_forward(trainer.critic.module, batch)
            logps = trainer.policy_forward(trainer.model, batch).logps
            for adapter, found in (("critic", values), ("default", logps)):
                alone = copy.deepcopy(policy)
                alone.set_adapter(adapter)
                alone = alone.merge_and_unload()
                plain = SegmentValueHead(head.head.in_features, alone.base_model)
                plain.head.load_state_dict(head.head.state_dict())
                if adapter == "critic":
                    expected = trainer.critic_forward(plain, batch)
                else:
                    alone.eval()
                    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
                    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
                    images = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")}
                    if "mm_token_type_ids" in batch:
                        images["mm_token_type_ids"] = batch["mm_token_type_ids"]
                    logits = alone(input_ids=ids, attention_mask=attention, **images).logits.log_softmax(-1)
                    expected = logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, -3:]
                mask = batch["completion_mask"].bool()
                torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=2e-4)
            # They are two different models.
            assert (values - trainer.critic_forward(plain, batch)).abs().max() > 1e-2


class TestTraining:
    @pytest.mark.parametrize(
        ("family", "gradient_checkpointing"),
        [
            ("qwen2", False),
            ("qwen2", True),
            pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
            ("qwen2_5_vl", True),
        ],
        indirect=["family"],
    )
    def test_each_optimizer_moves_its_own_adapter(self, family, gradient_checkpointing, tmp_path):
        still = {"weight_decay": 0.0, "gradient_checkpointing": gradient_checkpointing, "max_steps": 4, "beta": 0.1}
        for frozen, moving, settings in (
            ("default", "critic", {"learning_rate": 0.0}),
            ("critic", "default", {"critic_learning_rate": 0.0}),
        ):
            trainer = adapter_trainer(family, tmp_path, **still, **settings)
            policy = trainer.accelerator.unwrap_model(trainer.model)
            before = parameters_by_owner(policy)
            trainer.train()
            after = parameters_by_owner(policy)
            for owner in (frozen, "base"):
                assert all(torch.equal(tensor, after[owner][name]) for name, tensor in before[owner].items()), owner
            assert not all(torch.equal(tensor, after[moving][name]) for name, tensor in before[moving].items())
            assert before[moving].keys() and policy.active_adapter == "default"
            assert all(math.isfinite(value) for value in logged(trainer, "critic/loss"))

    @TEXT_FAMILY
    def test_policy_is_trained_as_without_it(self, family, tmp_path):
        """The policy's update is that of a shared critic whose head says the same: its values do not touch it."""
        runs = []
        for critic in ("adapter", "none"):
            trainer = adapter_trainer(
                family, tmp_path, critic=critic, lam=1.0, max_steps=2, critic_learning_rate=0.0, beta=0.0,
                whiten_advantages=False, advantage_clamp=None,
            )  # fmt: skip
            if trainer.critic is not None:  # a critic that says 0
                with torch.no_grad():
                    trainer.critic.value_head.head.weight.zero_()
            trainer.train()
            runs.append(parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))["default"])
        for name, tensor in runs[0].items():
            torch.testing.assert_close(runs[1][name], tensor, rtol=0, atol=1e-6)

    @TEXT_FAMILY
    def test_critics_gradient_is_that_of_a_separate_model(self, family, tmp_path):
        """One step of plain gradient descent on the adapter and on a copy with nothing but that adapter."""
        trainer = adapter_trainer(family, tmp_path, optim="sgd", max_steps=1, num_mini_batches=1, beta=0.0,
                                  critic_max_grad_norm=1e9, learning_rate=0.0)  # fmt: skip
        policy = randomized(trainer.accelerator.unwrap_model(trainer.model))
        alone = copy.deepcopy(policy)
        alone.set_adapter("critic")
        head = copy.deepcopy(trainer.critic.value_head.head)
        batches, loss_of = [], trainer.critic_loss

        def keep(batch, values):
            batches.append(batch)
            return loss_of(batch, values)

        trainer.critic_loss = keep
        before = parameters_by_owner(policy)["critic"]
        trainer.train()
        after = parameters_by_owner(policy)["critic"]

        (batch,) = batches
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        hidden = alone.get_base_model().base_model(input_ids=ids, attention_mask=attention).last_hidden_state
        values = head(hidden).squeeze(-1)[:, -batch["completion_ids"].size(1) - 1 : -1]
        first = torch.zeros_like(batch["segment_ids"], dtype=torch.bool)
        for row, segment_ids in enumerate(batch["segment_ids"].tolist()):
            seen = set()
            for t, segment in enumerate(segment_ids):
                first[row, t] = segment >= 0 and segment not in seen
                seen.add(segment)
        (0.5 * (values - batch["returns"])[first].square().mean()).backward()
        assert len(before) > 0
        for name, parameter in alone.named_parameters():
            if ".critic." in name:
                expected = before[name] - trainer.args.critic_learning_rate * parameter.grad
                torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=name)

    @TEXT_FAMILY
    def test_policys_optimizer_does_not_know_the_critic(self, family, tmp_path):
        trainer = adapter_trainer(family, tmp_path)
        trainer.train()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        known = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
        assert known and not any(".critic." in name for name in known)
        critic = {names.get(id(p)) for group in trainer.critic.optimizer.param_groups for p in group["params"]}
        assert all(name is None or ".critic." in name for name in critic) and len(critic) > 1


class TestSwitching:
    @TEXT_FAMILY
    def test_an_exception_leaves_the_policys_adapter_active(self, family, tmp_path):
        trainer = adapter_trainer(family, tmp_path)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        loss_of = trainer.critic_loss

        def fail(*args):
            loss_of(*args)
            assert policy.active_adapter == "critic"
            raise RuntimeError("in the middle of the critic's update")

        trainer.critic_loss = fail
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.train()
        assert policy.active_adapter == "default"
        assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
        assert trainable and not any(".critic." in name for name in trainable)

    @TEXT_FAMILY
    @pytest.mark.parametrize("kind", ["lora", "modules_to_save", "ia3", "added_later"])
    def test_it_leaves_every_layer_as_peft_does(self, family, kind):
        """`PeftModel.set_adapter` is the reference, on a copy."""
        targets = LORA["target_modules"]
        config = {
            "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
            "ia3": IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
        }.get(kind, LoraConfig(**LORA))
        policy = get_peft_model(family.build_model(), config)
        reference = copy.deepcopy(policy)
        adapter = CriticAdapter(policy)
        CriticAdapter(reference)
        if kind == "added_later":
            with adapter.active():
                pass
            for model in (policy, reference):
                model.add_adapter("third", LoraConfig(**{**LORA, "target_modules": ["up_proj"]}))
        for _ in range(2):
            with adapter.active():
                reference.set_adapter("critic")
                assert switches(policy) == switches(reference)
            reference.set_adapter("default")
            assert switches(policy) == switches(reference)

    @TEXT_FAMILY
    def test_only_the_first_switch_walks_through_the_model(self, family, monkeypatch):
        policy = get_peft_model(family.build_model(), LoraConfig(**LORA))
        adapter = CriticAdapter(policy)
        walks = []
        modules = torch.nn.Module.modules
        monkeypatch.setattr(torch.nn.Module, "modules", lambda self, *args: walks.append(self) or modules(self, *args))
        for number in (1, 0):
            walks.clear()
            with adapter.active():
                assert policy.active_adapter == "critic"
            assert policy.active_adapter == "default"
            assert sum(len(list(modules(walked))) > 100 for walked in walks) == number

    @TEXT_FAMILY
    def test_generation_and_reference_use_the_policys_adapter_and_none(self, family, tmp_path):
        """With a critic's adapter that turns everything upside down, a policy that has not moved is its reference."""
        trainer = adapter_trainer(family, tmp_path, beta=0.1, max_steps=1, num_mini_batches=1)
        with torch.no_grad():
            for _, parameter in trainer.critic.value_head.adapter.named_parameters():
                parameter.normal_(0, 1.0)
        trainer.train()
        assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-6)]


class TestSaving:
    @FAMILIES
    def test_two_adapters_load_with_plain_peft(self, family, tmp_path):
        base = tmp_path / "base"
        family.build_model().save_pretrained(base)
        model = family.model_class.from_pretrained(base)
        trainer = adapter_trainer(family, tmp_path / "run", model=model, max_steps=2)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        auto = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
        policy = trainer.accelerator.unwrap_model(trainer.model)
        for owner, folder in (("default", tmp_path / "saved"), ("critic", tmp_path / "saved" / "critic")):
            loaded = PeftModel.from_pretrained(auto.from_pretrained(base), folder)
            expected = parameters_by_owner(policy)[owner]
            found = {
                name.replace(".default.", f".{owner}."): t for name, t in state_of(loaded).items() if "lora_" in name
            }
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        fresh = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "saved", is_trainable=True)
        critic = SegmentValueHead.from_pretrained(tmp_path / "saved" / "critic", policy=fresh)
        assert critic.mode == "adapter" and fresh.active_adapter == "default"
        ids = torch.tensor([[30, 31, 32]])
        with torch.no_grad():
            values = critic(input_ids=ids, attention_mask=torch.ones_like(ids))
            again = trainer.critic.value_head(input_ids=ids, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(values, again, rtol=0, atol=1e-5)

    @TEXT_FAMILY
    def test_the_policys_adapter_is_loaded_beside_the_critics(self, family, tmp_path):
        """transformers 5.17 loads the adapters in folders of a checkpoint, and then not the checkpoint's own."""
        saved = randomized(get_peft_model(family.build_model(), LoraConfig(**LORA)))
        saved.save_pretrained(tmp_path)
        saved.save_pretrained(tmp_path / "critic")
        policy = get_peft_model(family.build_model(), LoraConfig(**LORA))
        with complete_load(policy, str(tmp_path), is_fsdp=False):
            pass  # as transformers 5.17 does
        expected = parameters_by_owner(saved)["default"]
        assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)  # new ones are 0
        torch.testing.assert_close(parameters_by_owner(policy)["default"], expected, rtol=0, atol=0)
        trained = [p.requires_grad for n, p in policy.named_parameters() if ".default." in n]
        assert trained and all(trained)

    @TEXT_FAMILY
    def test_resume_equals_an_uninterrupted_run(self, family, tmp_path):
        base = tmp_path / "base"
        family.build_model().save_pretrained(base)
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2}

        def trainer(folder, max_steps):
            model = family.model_class.from_pretrained(base)
            return adapter_trainer(family, tmp_path / folder, model=model, max_steps=max_steps, **settings)

        whole = trainer("whole", 4)
        recorder = WeightRecorder(whole.model, whole.critic.value_head)
        whole.add_callback(recorder)
        whole.train()
        trainer("parts", 2).train()
        resumed = trainer("parts", 4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        for module, expected in zip((resumed.model, resumed.critic.value_head), recorder.states[-1], strict=True):
            for name, tensor in state_of(module).items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)

    @TEXT_FAMILY
    def test_another_policys_adapter_is_an_error(self, family, tmp_path):
        one = get_peft_model(family.build_model(), LoraConfig(**LORA))
        SegmentValueHead.from_policy(one, mode="adapter").save_pretrained(tmp_path / "critic")
        other = get_peft_model(family.build_model(), LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
        with pytest.raises(ValueError, match=r"does not fit the policy: \d+ of its \d+ tensors have no place"):
            SegmentValueHead.from_pretrained(tmp_path / "critic", policy=other)
        with pytest.raises(ValueError, match="is an adapter on its policy's base model: pass the `policy`"):
            SegmentValueHead.from_pretrained(tmp_path / "critic")


class TestErrors:
    @TEXT_FAMILY
    def test_a_policy_without_adapter(self, family, tmp_path):
        with pytest.raises(ValueError, match="pass a `peft_config`"):
            sapo_trainer(family, tmp_path, critic="adapter")
        with pytest.raises(TypeError, match="must be a `PeftModel`"):
            SegmentValueHead.from_policy(family.build_model(), mode="adapter")
