"""DPO-Positive: its pairs, its loss against a slow reference and against TRL, its training."""

import ast
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from sapo_trl.data import to_prompts
from sapo_trl.embedded import make_problems
from sapo_trl.recipes import (
    DPOPTrainer,
    dpop_trainer,
    preference_pairs,
    restem,
)
from sapo_trl.recipes.sampling import encode_prompts, training_rows
from sapo_trl.rewards import accuracy_reward
from tests.recipes.tiny_runs import EVERY_FAMILY, TEXT, TEXT_AND_IMAGES, dpop_config, picture_run, table
from tests.testing_utils import length_reward, logged, state_of, text_dataset, unmoved


class TestPreferencePairs:
    def test_each_pair_is_of_one_prompt_and_no_response_is_in_two(self):
        dataset = text_dataset(4)
        samples = table(
            *((0, text, 1.0, True) for text in ("r1", "r2", "r3", "r1")),
            *((0, text, 0.0, True) for text in ("w1", "w2")),
            (1, "r1", 1.0, True),  # never wrong
            (2, "w1", 0.0, True),  # never right
            (3, "r1", 0.6, True),
            (3, "w1", 0.5, True),  # equal to the threshold
            (3, "w2", 0.0, False),  # cut off
            (3, "n", math.nan, True),  # neither
        )
        pairs = preference_pairs(samples, dataset, reward_threshold=0.5, max_pairs_per_prompt=9)
        assert pairs.column_names == ["prompt", "chosen", "rejected"]
        prompts = [dataset["prompt"][:].index(prompt) for prompt in pairs["prompt"]]
        assert prompts == [0, 0, 3]
        for column, texts in (("chosen", {"r1", "r2", "r3"}), ("rejected", {"w1", "w2"})):
            contents = [message["content"] for (message,) in pairs[column]]
            assert len(set(contents[:2])) == 2 and set(contents[:2]) <= texts
            assert contents[2] == {"chosen": "r1", "rejected": "w1"}[column]
        assert len(preference_pairs(samples, dataset, reward_threshold=0.5)) == 2
        assert len(preference_pairs(samples, dataset, max_pairs_per_prompt=9, keep_truncated=True)) == 3

    def test_seed_decides_the_pairs(self):
        samples = table(*((0, f"{i}", float(i % 2), True) for i in range(40)))
        first, again, other = (preference_pairs(samples, text_dataset(1), seed=s).to_list() for s in (0, 0, 1))
        assert first == again != other

    def test_a_text_that_is_right_and_wrong_tells_nothing(self):
        samples = table((0, "a", 1.0, True), (0, "a", 0.0, True))
        with pytest.raises(ValueError, match="2 responses to 1 prompts make no pair: .* 1 prompts have a right"):
            preference_pairs(samples, text_dataset(1))


def pairs_for(family, n: int = 4) -> Dataset:
    chosen = [f"AB={i}\n" * (1 + i % 3) for i in range(n)]
    rejected = [f"AB={9 - i}" for i in range(n)]
    return training_rows(family.dataset(n), list(range(n)), chosen=chosen, rejected=rejected)


def pair_trainer(family, output_dir, *, cls=DPOPTrainer, trainer_kwargs=None, **settings):
    """A trainer whose policy has been moved away from its reference at random."""
    model = family.build_model()
    kwargs = {"ref_model": copy.deepcopy(model), **(trainer_kwargs or {})}
    settings = {"per_device_train_batch_size": 4, **settings}
    trainer = cls(
        model=model,
        args=dpop_config(output_dir, **settings),
        train_dataset=pairs_for(family),
        processing_class=family.processing_class,
        **kwargs,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    trainer.model.eval()
    return trainer


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))


def slow_logps(model, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Log-probability of each response, from a forward of its own without padding, one token at a time."""
    sums, first_patch = [], 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        inputs = {"input_ids": batch["input_ids"][row, mask][None]}
        if "pixel_values" in batch:
            grid = batch["image_grid_thw"][row : row + 1]
            patches = int(grid.prod())
            inputs["image_grid_thw"] = grid
            inputs["pixel_values"] = batch["pixel_values"][first_patch : first_patch + patches]
            inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][row, mask][None]
            first_patch += patches
        logits = model(**inputs, use_cache=False).logits[0]
        is_response = batch["completion_mask"][row, mask].bool()
        total = torch.zeros(())
        for position in range(1, len(is_response)):
            if is_response[position]:
                token = inputs["input_ids"][0, position]
                total = total + logits[position - 1].double().log_softmax(-1)[token]
        sums.append(total)
    return sums


def slow_dpop(policy, reference, batch, beta: float, penalty: float) -> torch.Tensor:
    """Equation 3 of the paper, pair by pair."""
    logps = slow_logps(policy, batch)
    with torch.no_grad():
        ref_logps = slow_logps(reference, batch)
    pairs = len(logps) // 2
    losses = []
    for i in range(pairs):
        log_ratio_w = logps[i] - ref_logps[i]
        log_ratio_l = logps[i + pairs] - ref_logps[i + pairs]
        positive = max(torch.zeros((), dtype=torch.float64), ref_logps[i] - logps[i])
        losses.append(-torch.log(torch.sigmoid(beta * (log_ratio_w - log_ratio_l - penalty * positive))))
    return sum(losses) / pairs


def loss_and_gradients(trainer, compute_loss, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = compute_loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


class TestDPOPLoss:
    @TEXT_AND_IMAGES
    @pytest.mark.parametrize("penalty", [0.0, 0.7, 3.0])
    def test_slow_reference(self, family, penalty, tmp_path):
        trainer = pair_trainer(family, tmp_path, dpop_penalty=penalty, beta=0.3)
        batch = batch_of(trainer)
        loss, gradients = loss_and_gradients(trainer, lambda b: trainer.compute_loss(trainer.model, b), batch)
        expected, expected_gradients = loss_and_gradients(
            trainer, lambda b: slow_dpop(trainer.model, trainer.ref_model, b, 0.3, penalty), batch
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=2e-3, atol=2e-4, msg=name)

        # The penalty is at work: some of the chosen responses have become less probable, and not all.
        with torch.no_grad():
            ratios = torch.stack(slow_logps(trainer.model, batch)) - torch.stack(slow_logps(trainer.ref_model, batch))
        chosen = ratios[: len(ratios) // 2]
        assert (chosen < 0).any()
        assert trainer.dpop_penalties["eval"] == [pytest.approx(F.relu(-chosen).mean().item(), rel=1e-3)]

    @TEXT
    @pytest.mark.parametrize("penalty", [0.5, 50.0])
    def test_numbers_by_hand(self, family, penalty, tmp_path, monkeypatch):
        """The formula alone: chosen ratio -2, rejected ratio -3, so a margin of 1 and a penalty of 2."""
        trainer = pair_trainer(family, tmp_path, dpop_penalty=penalty, beta=0.1)
        batch = batch_of(trainer)
        with torch.no_grad():
            logps = torch.stack(slow_logps(trainer.model, batch)).float()
        ref_logps = (logps + torch.tensor([2.0, 3.0]).repeat_interleave(len(logps) // 2)).chunk(2)
        monkeypatch.setattr(trainer, "compute_ref_log_probs", lambda model, inputs: ref_logps)
        loss = trainer.compute_loss(trainer.model, batch).item()
        assert loss == pytest.approx(math.log1p(math.exp(-0.1 * (1 - penalty * 2))), rel=1e-4)

    @TEXT_AND_IMAGES
    def test_without_penalty_it_is_trls_loss(self, family, tmp_path):
        trainer = pair_trainer(family, tmp_path, dpop_penalty=0.0)
        batch = batch_of(trainer)
        ours = loss_and_gradients(trainer, lambda b: trainer.compute_loss(trainer.model, b), batch)
        theirs = loss_and_gradients(trainer, lambda b: DPOTrainer.compute_loss(trainer, trainer.model, b), batch)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
        assert ours[0] != pytest.approx(math.log(2), abs=1e-3)  # policy and reference differ
        assert ours[1].keys() == theirs[1].keys()
        for name, gradient in ours[1].items():
            torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-5, atol=1e-6, msg=name)

    @TEXT
    @pytest.mark.parametrize("how", ["precomputed", "adapter", "half precision"])
    def test_without_penalty_it_is_trls_loss_however_the_reference_is_had(self, family, how, tmp_path):
        settings, kwargs = {}, {}
        if how == "precomputed":
            settings = {"precompute_ref_log_probs": True}
        elif how == "adapter":
            kwargs = {"peft_config": LoraConfig(r=2, init_lora_weights=False), "ref_model": None}
        else:
            settings = {"bf16": True}
        trainer = pair_trainer(family, tmp_path, dpop_penalty=0.0, trainer_kwargs=kwargs, **settings)
        batch = batch_of(trainer)
        with trainer.compute_loss_context_manager(), torch.no_grad():
            ours = trainer.compute_loss(trainer.model, batch)
            theirs = DPOTrainer.compute_loss(trainer, trainer.model, batch)
            trainer.args.dpop_penalty = 50.0
            penalized = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert penalized > ours
        assert trainer.precompute_ref_logps == (how == "precomputed")

    @TEXT
    def test_no_forward_is_repeated(self, family, tmp_path):
        trainer = pair_trainer(family, tmp_path)
        calls = []
        for name in ("model", "ref_model"):
            getattr(trainer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
        trainer.compute_loss(trainer.model, batch_of(trainer))
        assert sorted(calls) == ["model", "ref_model"]

    @TEXT
    def test_trls_metrics_stay(self, family, tmp_path):
        ours = pair_trainer(family, tmp_path / "ours", dpop_penalty=5.0)
        theirs = pair_trainer(family, tmp_path / "theirs", cls=DPOTrainer)
        logs = []
        for trainer in (ours, theirs):
            trainer.compute_loss(trainer.model, batch_of(trainer))
            trainer.log({})
            logs.append(trainer.state.log_history[-1])
        assert logs[0].keys() - logs[1].keys() == {"eval_dpop/penalty"}
        assert {name: logs[0][name] for name in logs[1]} == pytest.approx(logs[1])

    def test_nothing_private_of_trl_is_overridden(self):
        """The two public methods that we override are in TRL, with these parameters."""
        ours = {name for name in vars(DPOPTrainer) if not name.startswith("__")}
        assert {name for name in ours if hasattr(DPOTrainer, name)} == {"compute_loss", "log"}
        parameters = DPOTrainer.compute_loss.__code__.co_varnames[:5]
        assert parameters == ("self", "model", "inputs", "return_outputs", "num_items_in_batch")
        assert DPOTrainer.compute_ref_log_probs.__code__.co_varnames[:3] == ("self", "model", "inputs")


@pytest.mark.parametrize("path", sorted(Path(restem.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_private_name_of_another_object_is_touched(path):
    nodes = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert [name for name in nodes if name.startswith("_") and not name.startswith("__")] == []


class TestDPOP:
    @EVERY_FAMILY
    def test_trains_on_its_own_samples(self, family, tmp_path):
        model = family.build_model()
        before = state_of(model)
        args = dpop_config(tmp_path, max_pairs_per_prompt=2, eval_strategy="steps", eval_steps=2, learning_rate=0.01)
        trainer = dpop_trainer(
            model, length_reward, args, family.dataset(), family.processing_class, eval_dataset=pairs_for(family)
        )
        assert unmoved(before, trainer.ref_model) == list(before)
        trainer.train()
        assert unmoved(before, trainer.ref_model) == list(before)
        assert unmoved(before, trainer.model) == []
        losses = logged(trainer, "loss")
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # the policy is still the reference
        assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
        assert logged(trainer, "dpop/penalty")[0] == pytest.approx(0, abs=1e-4)
        assert len(logged(trainer, "dpop/penalty")) == 2 and len(logged(trainer, "eval_dpop/penalty")) == 1
        samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
        assert len(samples) == 32
        for pair in trainer.train_dataset:
            texts = [pair[name][0]["content"] for name in ("chosen", "rejected")]
            rewards = [
                {s["reward"] for s in samples if s["response"] == text and s["prompt"] == pair["prompt"]}
                for text in texts
            ]
            assert min(rewards[0]) > 0.4 >= max(rewards[1])

    @TEXT
    def test_a_folder(self, family, tmp_path):
        family.build_model().save_pretrained(tmp_path / "model")
        family.tokenizer.save_pretrained(tmp_path / "model")
        trainer = dpop_trainer(str(tmp_path / "model"), length_reward, dpop_config(tmp_path), family.dataset())
        trainer.train()
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))

    @EVERY_FAMILY
    def test_only_responses_count_after_the_prompt_they_were_sampled_after(self, family, tmp_path):
        trainer = pair_trainer(family, tmp_path)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        pairs, dataset = pairs_for(family), family.dataset(4)
        expected = [message["content"] for column in ("chosen", "rejected") for (message,) in pairs[column]]
        for row, text in enumerate(expected):
            ids, counts = batch["input_ids"][row], batch["completion_mask"][row].bool()
            assert family.tokenizer.decode(ids[counts]) == f"{text}<|im_end|>\n"
            prompt = encode_prompts(family.processing_class, [dataset[row % 4]])["input_ids"][0]
            assert torch.equal(ids[: len(prompt)], prompt) and counts.nonzero()[0] == len(prompt)

    @TEXT
    def test_samples_without_a_pair_are_written_all_the_same(self, family, tmp_path):
        args = dpop_config(tmp_path, reward_threshold=1.0)
        with pytest.raises(ValueError, match="0 prompts have a right response, 8 a wrong one and 0 both"):
            dpop_trainer(family.build_model(), length_reward, args, family.dataset(), family.tokenizer)
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 32

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dpop_penalty": -1.0}, r"`dpop_penalty` must lie in \[0, inf\), got -1.0"),
            ({"dpop_penalty": math.nan}, r"`dpop_penalty` must lie in \[0, inf\), got nan"),
            ({"max_pairs_per_prompt": 0}, "`max_pairs_per_prompt` must be at least 1, got 0"),
            ({"loss_type": ["hinge"]}, r"`loss_type` must stay \['sigmoid'\], got \['hinge'\]"),
            ({"ld_alpha": 0.5}, "`ld_alpha` must stay None, got 0.5"),
            ({"top_p": 0.0}, r"`top_p` must lie in \(0, 1\], got 0.0"),
        ],
    )
    def test_bad_settings(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            dpop_config(tmp_path, **settings)

    @TEXT
    def test_configuration_must_have_the_penalty(self, family, tmp_path):
        model = family.build_model()
        args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
        with pytest.raises(TypeError, match="`args` must be a `DPOPConfig`, got DPOConfig"):
            DPOPTrainer(model, copy.deepcopy(model), args, None, pairs_for(family), processing_class=family.tokenizer)


@pytest.mark.slow
def test_dpop_trains_the_picture_task(warm_model, tmp_path):
    model, processor = copy.deepcopy(warm_model[0]), warm_model[1]
    before = state_of(model)
    dataset = to_prompts(make_problems(64))
    args = dpop_config(tmp_path, **picture_run(learning_rate=1e-4, max_pairs_per_prompt=2))
    trainer = dpop_trainer(model, accuracy_reward, args, dataset, processor)
    trainer.train()
    assert trainer.state.global_step == 30
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert unmoved(before, trainer.model) == []
    assert sum(logged(trainer, "rewards/margins")[-5:]) > 0  # it tells right from wrong responses it was shown
