"""ReST-EM: its samples, the rows that it keeps, its training."""

import json
import math
import random
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ProcessorMixin, TrainerCallback
from trl import SFTTrainer

from sapo_trl.data import to_prompts
from sapo_trl.embedded import make_problems
from sapo_trl.recipes import (
    ReSTEM,
    kept_rows,
    restem,
)
from sapo_trl.recipes.sampling import encode_prompts, training_rows
from sapo_trl.rewards import accuracy_reward
from tests.recipes.tiny_runs import (
    EVERY_FAMILY,
    TEXT,
    TEXT_AND_IMAGES,
    picture_run,
    restem_config,
    sample,
    scripted,
    table,
)
from tests.testing_utils import length_reward, logged, state_of, text_dataset, unmoved


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
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])  # it learns the kept responses
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
