"""ReST-EM and DPO-Positive: against slow references, against TRL, and end to end."""

import ast
import copy
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, ProcessorMixin, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

from sapo_trl.data import to_prompts
from sapo_trl.embedded import load_processor, make_problems
from sapo_trl.recipes import (
    DPOPConfig,
    DPOPTrainer,
    ReSTEM,
    ReSTEMConfig,
    dpop_trainer,
    kept_rows,
    preference_pairs,
    restem,
    sample_responses,
)
from sapo_trl.recipes.sampling import encode_prompts, training_rows
from sapo_trl.rewards import accuracy_reward
from tests.testing_utils import length_reward, logged, state_of, text_dataset, unmoved


CONFIGS = Path(__file__).parents[2] / "trainer_configs" / "algorithms"
TEXT = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
TEXT_AND_IMAGES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)

EVERY_FAMILY = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)

TINY_RUN = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "num_samples": 4,
    "max_completion_length": 6,
    # A tiny random model does not end its responses.
    "keep_truncated": True,
    "reward_threshold": 0.4,
}


def restem_config(output_dir, **settings) -> ReSTEMConfig:
    return ReSTEMConfig(str(output_dir), **{**TINY_RUN, **settings})


def dpop_config(output_dir, **settings) -> DPOPConfig:
    return DPOPConfig(str(output_dir), **{**TINY_RUN, **settings})


def sample(family, n=3, num_samples=2, *, model=None, dataset=None, reward=length_reward, **settings) -> Dataset:
    settings = {"max_completion_length": 5, "disable_tqdm": True, **settings}
    model = family.build_model() if model is None else model
    dataset = family.dataset(n) if dataset is None else dataset
    return sample_responses(model, family.processing_class, dataset, reward, num_samples, **settings)


def scripted(model, family, responses: list[str]):
    """Let a model generate given texts, in turn, whatever it is asked."""
    remaining = iter(responses)

    def generate(input_ids, generation_config, **inputs):
        texts = [next(remaining) for _ in input_ids]
        ids = family.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], 1)

    model.generate = generate
    return model


def table(*rows) -> Dataset:
    names = ("prompt_index", "response", "reward", "finished")
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


# ------------------------------------------------------------------------------------------------------------ sampling


class TestSampling:
    @TEXT_AND_IMAGES
    @torch.no_grad()
    def test_most_probable_tokens_are_those_of_plain_forwards(self, family):
        """`top_k=1` leaves nothing to chance; the reference sees each prompt alone, without padding or cache."""
        model = family.build_model()
        dataset = family.dataset(3)
        ids_seen = []

        def reward(completion_ids, **kwargs):
            ids_seen.extend(completion_ids)
            return [0.0] * len(completion_ids)

        sample(family, num_samples=1, model=model, dataset=dataset, reward=reward, top_k=1)
        model.eval()
        for row, ids in zip(dataset, ids_seen, strict=True):
            inputs = dict(encode_prompts(family.processing_class, [row]))
            expected = []
            while len(expected) < 5 and family.tokenizer.eos_token_id not in expected:
                token = model(**inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                expected.append(token.item())
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                for name in ("attention_mask", "mm_token_type_ids"):
                    if name in inputs:
                        value = torch.full_like(token, name == "attention_mask")
                        inputs[name] = torch.cat([inputs[name], value], 1)
            assert ids == expected

    @TEXT
    def test_a_models_own_end_of_turn_ends_a_response(self, family):
        """Some chat models end their turns with another token than their tokenizer's."""
        model = family.build_model()
        ends = list(range(20, 250, 2))
        model.generation_config.eos_token_id = ends
        ids_seen = []

        def reward(completion_ids, **kwargs):
            ids_seen.extend(completion_ids)
            return [0.0] * len(completion_ids)

        samples = sample(family, num_samples=4, model=model, dataset=family.dataset(4), reward=reward)
        ends.append(family.tokenizer.eos_token_id)
        assert samples["finished"] == [ids[-1] in ends for ids in ids_seen] and any(samples["finished"])
        assert not any(token in ends for ids in ids_seen for token in ids[:-1])

    @TEXT_AND_IMAGES
    def test_rewards_are_called_as_trl_calls_them(self, family):
        calls = []

        def reward(prompts, completions, completion_ids, answer, **columns):
            calls.append(columns.keys())
            for prompt, completion in zip(prompts, completions, strict=True):
                assert prompt[-1]["role"] == "user"
                assert [message["role"] for message in completion] == ["assistant"]
            return [float(text) for text in answer]

        dataset = family.dataset(3)
        samples = sample(family, num_samples=2, dataset=dataset, reward=[reward, length_reward], batch_size=4)
        assert len(calls) == 2
        assert all(columns == ({"images"} if family.takes_images else set()) for columns in calls)
        assert samples["prompt_index"][:] == [0, 0, 1, 1, 2, 2]
        assert samples["prompt"][:] == [row["prompt"] for row in dataset for _ in range(2)]
        for row in samples:
            assert 0 <= row["reward"] - float(dataset[row["prompt_index"]]["answer"]) < 1

    @TEXT
    def test_rewards_are_weighted_and_none_counts_for_nothing(self, family):
        some = [lambda completions, **kwargs: [1.0, None], lambda completions, **kwargs: [None, None]]
        rewards = sample(family, 1, reward=some, reward_weights=[3.0, 5.0])["reward"]
        assert rewards[0] == 3.0 and math.isnan(rewards[1])

    @TEXT
    def test_responses_end_at_their_first_end_token(self, family):
        model = scripted(family.build_model(), family, ["AB=1<|im_end|>", "AB=1\nBC=2", "<|im_end|>AB<|im_end|>"])
        lengths = []

        def reward(completion_ids, **kwargs):
            lengths.extend(len(ids) for ids in completion_ids)
            return [0.0] * len(completion_ids)

        samples = sample(family, 3, 1, model=model, reward=reward)
        assert samples["response"][:] == ["AB=1", "AB=1\nBC=2", ""]
        assert samples["finished"][:] == [True, False, True]
        count = len(family.tokenizer("AB=1")["input_ids"])
        assert (lengths[0], lengths[2]) == (count + 1, 1)

    @TEXT
    def test_seed_decides_and_nothing_else_is_touched(self, family):
        model = family.build_model().train()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first, again, other = (sample(family, model=model, seed=seed)["response"][:] for seed in (0, 0, 1))
        assert first == again != other
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training

    @TEXT
    def test_plain_text_prompts(self, family):
        dataset = Dataset.from_dict({"prompt": ["Find AB+", "Find"]})
        seen = []

        def reward(completions, **kwargs):
            seen.extend(completions)
            return [1.0] * len(completions)

        samples = sample(family, dataset=dataset, reward=reward)
        assert samples["response"][:] == seen
        rows = training_rows(dataset, samples["prompt_index"], completion=samples["response"])
        assert rows["completion"][:] == seen and rows["prompt"][:] == [p for p in dataset["prompt"] for _ in range(2)]

    @TEXT
    def test_a_models_own_generation_settings_do_not_count(self, family):
        model = family.build_model()
        expected = sample(family, model=model)["response"][:]
        model.generation_config.update(
            repetition_penalty=50.0, num_beams=3, top_k=1, min_p=0.9, no_repeat_ngram_size=1
        )
        assert sample(family, model=model)["response"][:] == expected

    @TEXT
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
            ({"batch_size": 0}, "`sampling_batch_size` must be at least 1, got 0"),
            ({"temperature": 0.0}, r"`sampling_temperature` must lie in \(0, inf\), got 0.0. 0 would"),
            ({"top_p": 1.5}, r"`top_p` must lie in \(0, 1\], got 1.5"),
            ({"top_k": -1}, "`top_k` must be at least 0, got -1. 0 samples from all tokens."),
            ({"max_completion_length": 0}, "`max_completion_length` must be at least 1, got 0"),
            ({"dataset": Dataset.from_dict({"question": ["?"]})}, r"no column `prompt`; it has \['question'\]"),
            ({"dataset": text_dataset(1).select([])}, "no rows"),
            ({"reward": []}, "`reward_funcs` is empty"),
            ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 values for 1 reward functions"),
            ({"reward": lambda completions, **kwargs: [1.0]}, "returned 1 rewards for 6 completions"),
        ],
    )
    def test_errors_name_field_and_value(self, family, settings, message):
        with pytest.raises(ValueError, match=message):
            sample(family, **settings)

    @TEXT
    def test_a_reward_function_cannot_end_it_as_if_all_were_well(self, family):
        with pytest.raises(RuntimeError, match=r"failed for all 6 completions: .*called sys\.exit\(0\)"):
            sample(family, reward=lambda completions, **kwargs: sys.exit(0))

    @TEXT
    def test_only_functions_and_data_sets_will_do(self, family):
        with pytest.raises(TypeError, match="`reward_funcs` must be plain functions, got Linear"):
            sample(family, reward=torch.nn.Linear(1, 1))
        with pytest.raises(TypeError, match="must be a `datasets.Dataset`, got list"):
            sample(family, dataset=[{"prompt": "?"}])


# ----------------------------------------------------------------------------------------------------------- selection


class TestKeptRows:
    def test_by_hand(self):
        samples = table(
            (0, "a", 1.0, True),
            (0, "a", 1.0, True),  # the same again
            (0, "b", 0.5, True),  # not greater than the threshold
            (0, "c", 1.0, False),  # cut off
            (1, "a", 1.0, True),  # another prompt's
            (1, "b", 0.6, True),
            (1, "c", 0.9, True),
            (2, "a", math.nan, True),
        )
        assert kept_rows(samples, reward_threshold=0.5, max_kept_per_prompt=2) == [0, 4, 6]
        assert kept_rows(samples, reward_threshold=0.5, max_kept_per_prompt=9) == [0, 4, 5, 6]
        assert kept_rows(samples, reward_threshold=0.4, max_kept_per_prompt=9) == [0, 2, 4, 5, 6]
        truncated = kept_rows(samples, reward_threshold=0.5, max_kept_per_prompt=1, keep_truncated=True)
        assert truncated == [0, 4]  # of equal rewards the first

    @pytest.mark.parametrize("seed", range(5))
    def test_against_the_definition(self, seed):
        rng = random.Random(seed)
        rows = [(rng.randrange(4), rng.choice("abcde"), rng.randrange(4), rng.random() < 0.7) for _ in range(50)]
        kept = kept_rows(table(*rows), reward_threshold=0, max_kept_per_prompt=2)
        for row, (prompt, _, reward, finished) in enumerate(rows):
            right = [i for i, r in enumerate(rows) if r[0] == prompt and r[2] > 0 and r[3]]
            firsts = [i for i in right if not any(j < i and rows[j][1] == rows[i][1] for j in right)]
            better = [i for i in firsts if (-rows[i][2], i) < (-reward, row)]
            assert (row in kept) == (reward > 0 and finished and row in firsts and len(better) < 2)


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


# ------------------------------------------------------------------------------------------------------------- ReST-EM


class TestReSTEM:
    @EVERY_FAMILY
    def test_trains(self, family, tmp_path):
        model = family.build_model()
        before = state_of(model)
        recipe = ReSTEM(model, length_reward, restem_config(tmp_path), family.dataset(), family.processing_class)
        trainer = recipe.train()
        assert unmoved(before, model) == list(before)  # the original
        assert len(unmoved(before, trainer.model)) == 0
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        assert logged(trainer, "restem/iteration") == [2]
        for iteration in (1, 2):
            rows = [json.loads(line) for line in (tmp_path / f"iteration_{iteration}.jsonl").open()]
            assert len(rows) == 8 * 4
            kept = [i for i, row in enumerate(rows) if row["kept"]]
            assert kept and all(rows[i]["reward"] > 0.4 for i in kept)
            assert kept == kept_rows(
                Dataset.from_list(rows), reward_threshold=0.4, max_kept_per_prompt=10, keep_truncated=True
            )
        assert logged(trainer, "restem/kept_fraction") == [len(kept) / 32]
        assert logged(trainer, "restem/reward")[0] == pytest.approx(sum(row["reward"] for row in rows) / 32)

    @TEXT
    def test_m_steps_start_from_the_original_and_e_steps_sample_from_the_latest(self, family, tmp_path, monkeypatch):
        model = family.build_model()
        started_from, ended_at, sampled_from = [], [], []

        class Weights(TrainerCallback):
            def on_train_begin(self, args, state, control, model, **kwargs):
                started_from.append(state_of(model))

            def on_train_end(self, args, state, control, model, **kwargs):
                ended_at.append(state_of(model))

        def spy(args, policy, *rest, **kwargs):
            sampled_from.append(state_of(policy))
            return original(args, policy, *rest, **kwargs)

        original = restem.sample_as_configured
        monkeypatch.setattr(restem, "sample_as_configured", spy)
        args = restem_config(tmp_path, num_iterations=3)
        ReSTEM(model, length_reward, args, family.dataset(), family.tokenizer, callbacks=[Weights()]).train()
        for weights in started_from:
            assert unmoved(weights, model) == list(weights)
        assert len(started_from) == len(ended_at) == len(sampled_from) == 3
        for expected, weights in zip([state_of(model), *ended_at], sampled_from, strict=False):
            assert all(torch.equal(expected[name], weights[name]) for name in expected)
        assert not torch.equal(ended_at[0]["lm_head.weight"], ended_at[1]["lm_head.weight"])

    @EVERY_FAMILY
    def test_only_the_response_is_learned_after_the_prompt_it_was_sampled_after(self, family, tmp_path):
        dataset = family.dataset(2)
        texts = ["AB=1\nBC=2", "9-4=5"]
        rows = training_rows(dataset, [1, 0], completion=texts)
        args = restem_config(tmp_path, dataloader_num_workers=0)
        trainer = SFTTrainer(family.build_model(), args, train_dataset=rows, processing_class=family.processing_class)
        assert trainer.completion_only_loss
        dataset_rows = [trainer.train_dataset[i] for i in range(2)]
        batch = trainer.data_collator(dataset_rows)
        for i, (source, text) in enumerate(zip([1, 0], texts, strict=True)):
            learned = batch["labels"][i] != -100
            assert family.tokenizer.decode(batch["labels"][i][learned]) == f"{text}<|im_end|>\n"
            assert torch.equal(batch["labels"][i][learned], batch["input_ids"][i][learned])
            prompt = encode_prompts(family.processing_class, [dataset[source]])["input_ids"][0]
            assert torch.equal(batch["input_ids"][i][: len(prompt)], prompt)
            assert learned.nonzero()[0] == len(prompt)
        if family.takes_images:
            pixels = encode_prompts(family.processing_class, [dataset[1], dataset[0]])["pixel_values"]
            assert torch.equal(batch["pixel_values"], pixels)

    @TEXT
    def test_what_is_kept_is_what_is_trained_on(self, family, tmp_path, monkeypatch):
        trained_on = []

        class Spy(SFTTrainer):
            def __init__(self, *args, **kwargs):
                trained_on.append(kwargs["train_dataset"])
                super().__init__(*args, **kwargs)

        monkeypatch.setattr(restem, "SFTTrainer", Spy)
        responses = ["one<|im_end|>", "one<|im_end|>", "zero<|im_end|>", "two<|im_end|>", "three<|im_end|>", "one"]
        model = scripted(family.build_model(), family, responses)
        values = {"zero": 0.0, "one": 1.0, "two": 2.0, "three": 3.0}
        args = restem_config(
            tmp_path,
            num_samples=3,
            num_iterations=1,
            keep_truncated=False,
            max_kept_per_prompt=1,
            reward_threshold=0.0,
        )

        def reward(completions, **kwargs):
            return [values[completion[0]["content"]] for completion in completions]

        ReSTEM(model, reward, args, family.dataset(2), family.tokenizer).train()
        (rows,) = trained_on
        assert rows["prompt"][:] == family.dataset(2)["prompt"][:]
        assert [message["content"] for (message,) in rows["completion"]] == ["one", "three"]

    @TEXT
    def test_an_iteration_that_keeps_nothing_says_why_and_loses_nothing(self, family, tmp_path):
        args = restem_config(tmp_path, reward_threshold=1.0)
        recipe = ReSTEM(family.build_model(), length_reward, args, family.dataset(), family.tokenizer)
        message = r"Iteration 1 sampled 32 responses to 8 prompts and kept none: the best reward is 0\.\d+, "
        with pytest.raises(ValueError, match=message + "reward_threshold=1.0 must be exceeded"):
            recipe.train()
        assert len((tmp_path / "iteration_1.jsonl").read_text().splitlines()) == 32

    @TEXT
    def test_a_folder_and_its_saved_models(self, family, tmp_path):
        family.build_model().save_pretrained(tmp_path / "model")
        family.tokenizer.save_pretrained(tmp_path / "model")
        args = restem_config(tmp_path / "out", save_strategy="steps", save_steps=2)
        trainer = ReSTEM(str(tmp_path / "model"), length_reward, args, family.dataset()).train()
        for iteration in (1, 2):
            assert (tmp_path / "out" / f"iteration_{iteration}" / "model.safetensors").exists()
            assert (tmp_path / "out" / f"iteration_{iteration}" / "checkpoint-2").exists()
        saved = type(trainer.model).from_pretrained(tmp_path / "out" / "iteration_2")
        assert unmoved(state_of(trainer.model), saved) == list(state_of(saved))
        with pytest.raises(ValueError, match="`processing_class` is needed"):
            ReSTEM(trainer.model, length_reward, args, family.dataset())

    @TEXT
    def test_adapters_and_half_precision(self, family, tmp_path):
        args = restem_config(tmp_path, bf16=True, gradient_checkpointing=True)
        model = family.build_model()
        recipe = ReSTEM(model, length_reward, args, family.dataset(), family.tokenizer, peft_config=LoraConfig(r=2))
        trainer = recipe.train()
        assert trainer.model.peft_config and not hasattr(model, "peft_config")
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_iterations": 0}, "`num_iterations` must be at least 1, got 0"),
            ({"max_kept_per_prompt": 0}, "`max_kept_per_prompt` must be at least 1, got 0"),
            ({"num_samples": -1}, "`num_samples` must be at least 1, got -1"),
            ({"reward_threshold": math.nan}, "`reward_threshold` must be a number"),
        ],
    )
    def test_bad_settings(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            restem_config(tmp_path, **settings)


# -------------------------------------------------------------------------------------------------------- DPO-Positive


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
        """And what is public is still there, with these parameters."""
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


# ------------------------------------------------------------------------------------------------------ configurations


class TestConfigurations:
    def test_the_papers_values_are_the_defaults(self, tmp_path):
        args = ReSTEMConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (args.num_samples, args.sampling_temperature, args.top_k, args.max_kept_per_prompt) == (32, 0.7, 40, 10)
        assert isinstance(args, SFTConfig) and args.max_length is None
        args = DPOPConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (args.dpop_penalty, args.max_pairs_per_prompt, args.max_length) == (50.0, 1, None)

    @pytest.mark.parametrize(("name", "config"), [("restem", ReSTEMConfig), ("dpop", DPOPConfig)])
    def test_files_are_read_and_overridden(self, name, config):
        line = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "--bf16", "false", "--num_samples", "3"]
        (args,) = TrlParser(config).parse_args_and_config(line)
        assert type(args) is config
        assert args.output_dir == f"outputs/{name}"
        assert (args.num_samples, args.sampling_batch_size, args.reward_threshold) == (3, 64, 0.0)

    @pytest.mark.parametrize("config", [ReSTEMConfig, DPOPConfig])
    def test_every_setting_has_a_help_text_and_a_place_in_the_docs(self, config):
        for cls in config.__mro__[:2]:
            for name in vars(cls).get("__annotations__", {}):
                assert config.__dataclass_fields__[name].metadata["help"]
                assert name in cls.__doc__


# ---------------------------------------------------------------------------------------------------- the picture task


@pytest.fixture(scope="module")
def warm_model(warm_folder):
    return AutoModelForImageTextToText.from_pretrained(warm_folder), load_processor(warm_folder)


def picture_run(**settings) -> dict:
    return {
        **TINY_RUN,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "num_samples": 16,
        "max_completion_length": 64,
        "sampling_batch_size": 256,
        "sampling_temperature": 1.0,
        "keep_truncated": False,
        "reward_threshold": 0.0,
        **settings,
    }


@pytest.mark.slow
def test_restem_trains_the_picture_task(warm_model, tmp_path):
    model, processor = warm_model
    assert isinstance(processor, ProcessorMixin)
    dataset = to_prompts(make_problems(64))
    args = restem_config(tmp_path, **picture_run(num_iterations=2, learning_rate=5e-4))
    trainer = ReSTEM(model, accuracy_reward, args, dataset, processor).train()
    assert trainer.state.global_step == 30
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    losses = logged(trainer, "loss")
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])  # it learns what it kept
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


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
