"""What a model's `generation_config` may do to the sampler: nothing that changes the distribution."""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig, WatermarkingConfig, set_seed

from sapo_trl.generation.model_settings import shaping_settings
from tests.testing_utils import FAMILIES, Recorder, sapo_trainer


LENGTH = 12

LEFTOVERS = {
    "min_p": 0.5,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.5,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(20, 120)],
    "sequence_bias": [[[30], 10.0]],
    "suppress_tokens": list(range(20, 120)),
    "begin_suppress_tokens": list(range(20, 250)),
    "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": (1, 3.0),
    "guidance_scale": 5.0,
    "watermarking_config": WatermarkingConfig(bias=5.0),
    "min_new_tokens": 10,
    "max_time": 1e-6,
    "num_beams": 3,
    "prompt_lookup_num_tokens": 3,
}

COMMON = {"do_sample": True, "temperature": 0.6, "top_k": 20}
"""What many checkpoints set, and TRL sets in any case."""


@pytest.fixture(scope="module")
def trainer(tokenizer, tmp_path_factory):
    return sapo_trainer(FAMILIES["qwen2"](tokenizer), tmp_path_factory.mktemp("run"), max_completion_length=LENGTH)


@pytest.fixture
def own_settings(trainer):
    """The model's `generation_config`, put back afterwards."""
    own = trainer.model.generation_config
    trainer.model.generation_config = copy.deepcopy(own)
    yield trainer.model.generation_config
    trainer.model.generation_config = own


def continuations(trainer, number: int = 64, length: int = LENGTH) -> list[list[int]]:
    """Responses to the first prompt, as Monte-Carlo critics sample them; the same with each call."""
    rows = list(trainer.train_dataset.select(range(1)))
    sampler = trainer.continuation_sampler(trainer.tokenized_prompts(rows), rows)
    sampler.rows_per_call = number
    set_seed(0)
    return sampler.sample([0] * number, [[]] * number, [length] * number)


def plain_samples(trainer, number: int = 64) -> list[list[int]]:
    """The same by transformers alone, which takes from the model what is left open."""
    prompt = trainer.tokenized_prompts(list(trainer.train_dataset.select(range(1)))).ids
    set_seed(0)
    ids = torch.tensor(prompt * number)
    output = trainer.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=LENGTH
    )
    return output[:, ids.size(1) :].tolist()


@pytest.mark.parametrize("name", list(LEFTOVERS))
def test_leftovers_change_no_sample(trainer, own_settings, name):
    own_settings.eos_token_id = list(range(20, 40))  # TRL has its own; so that some responses end
    expected, without = continuations(trainer), plain_samples(trainer)
    if name == "prompt_lookup_num_tokens":
        setattr(own_settings, name, LEFTOVERS[name])  # `generate` takes it for single prompts only
    else:
        own_settings.update(**{name: LEFTOVERS[name]})
        assert plain_samples(trainer) != without
    assert continuations(trainer) == expected
    assert getattr(trainer.model.generation_config, name) == LEFTOVERS[name]


def test_the_sampled_distribution_is_the_scored_one(trainer, own_settings):
    """Frequencies of a response's first token against the probabilities that the loss is computed from."""
    own_settings.update(min_p=0.9, suppress_tokens=list(range(20, 120)), guidance_scale=2.0)
    number = 5000
    counts = torch.bincount(
        torch.tensor(continuations(trainer, number, length=1)).flatten(), minlength=len(trainer.tokenizer)
    )
    prompts = trainer.tokenized_prompts(list(trainer.train_dataset.select(range(1))))
    tokens = [[token] for token in range(len(trainer.tokenizer))]
    batch = prompts.model_inputs([0] * len(tokens), tokens, trainer.tokenizer.pad_token_id, torch.device("cpu"))
    with torch.no_grad():
        probabilities = trainer.policy_forward(trainer.model, batch).logps.squeeze(1).double().exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
    expected = number * probabilities
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(tokens) - 1
    # Four standard deviations above its mean.
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")], ids=["full", "lora"])
def test_rollouts_ignore_them_and_it_is_said_once(peft_config, tokenizer, tmp_path, caplog):
    family = FAMILIES["qwen2"](tokenizer)
    rollouts = []
    for settings in ({}, {"min_p": 0.9, "no_repeat_ngram_size": 2, "typical_p": 1.0, **COMMON}):
        model, recorder = family.build_model(), Recorder()
        model.generation_config.update(**settings)
        trainer_kwargs = {"callbacks": [recorder], "peft_config": peft_config}
        with caplog.at_level(logging.WARNING, "sapo_trl"):
            trainer = sapo_trainer(
                family, tmp_path, model=model, learning_rate=0.0, trainer_kwargs=trainer_kwargs, critic="shared"
            )
            trainer.train()
        rollouts.append(recorder.rollouts[0])
        trainer.save_model(tmp_path / "saved")
    assert torch.equal(rollouts[0].completion_ids, rollouts[1].completion_ids)
    said = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    (message,) = said
    # Not what does nothing, nor what TRL sets anyway.
    assert "sets `min_p=0.9`, `no_repeat_ngram_size=2`. Training ignores" in message
    if peft_config is None:  # the model is saved with its own settings
        assert GenerationConfig.from_pretrained(tmp_path / "saved").min_p == 0.9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"generation_kwargs": {"min_p": 0.5, "no_repeat_ngram_size": 3}}, "`min_p=0.5`, `no_repeat_ngram_size=3`"),
        ({"generation_kwargs": {"temperature": 0.5}}, "`temperature=0.5`"),
        ({"generation_kwargs": {"do_sample": False}}, "`do_sample=False`"),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 20}, "`top_p=0.9`, `top_k=20`"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty=1.1`"),
    ],
)
def test_what_is_meant_stays_and_is_named(settings, named, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "sapo_trl"):
        trainer = sapo_trainer(FAMILIES["qwen2"](tokenizer), tmp_path, critic="none", **settings)
    said = [record.getMessage() for record in caplog.records if "Responses are sampled with" in record.getMessage()]
    if named is None:
        assert said == []
        return
    (message,) = said
    assert f"sampled with {named}, as `args` says" in message
    meant = settings.get("generation_kwargs", settings)
    assert {name: getattr(trainer.generation_config, name) for name in meant} == meant
    assert len(continuations(trainer)) == 64


def test_without_top_k_all_tokens_can_be_sampled(tokenizer, tmp_path):
    """`generate` takes 50 where neither its caller nor the model says how many."""
    trainer = sapo_trainer(FAMILIES["qwen2"](tokenizer), tmp_path, critic="none", top_k=None)
    assert len({ids[0] for ids in continuations(trainer, 2000, length=1)}) > 100


def test_settings_without_effect_shape_nothing():
    # What transformers writes where nothing was chosen.
    defaults = {
        **{"num_beams": 1, "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0},
        **{"no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "min_length": 0, "num_return_sequences": 1},
        **{"max_length": 20, "bad_words_ids": None, "do_sample": True, "num_assistant_tokens": 20},
    }
    assert shaping_settings(defaults) == {}
    assert shaping_settings({"min_new_tokens": 1, "forced_eos_token_id": 0}) == {
        "min_new_tokens": 1,
        "forced_eos_token_id": 0,
    }
