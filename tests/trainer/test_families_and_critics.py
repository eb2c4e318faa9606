"""Every family with every critic: log-probabilities and values of a training are those of each row alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import prepare_multimodal_messages

from sapo_trl import SAPOTrainer
from sapo_trl.callbacks import RolloutCallback
from tests.testing_utils import FAMILIES, length_reward, sapo_config
from tests.trainer.qwen_families import QWEN_FAMILIES, TRIED_FAMILIES, TriedFamily, tried_family
from tests.trainer.vision_families import VISION_FAMILIES, picture, pictured_prompts


CRITICS = {
    "shared": {},
    "separate": {},
    "ladder": {},
    "adapter": {},
    "none": {},
    "monte_carlo": {"segmentation": "entropy", "num_continuations": 2},
    "tree": {
        "segmentation": "sequence",
        "num_generations": 2,
        "tree_widths": [4, 2],
        "tree_segment_length": 3,
        "tree_replay_age": 1,  # an older edge keeps the log-probabilities of an older policy
        "kl_placement": "loss",
        "kl_estimator": "k3",
    },
}
"""Settings of each critic."""

LEARNED_CRITICS = ("shared", "separate", "ladder", "adapter")
NEW_FAMILIES = ("qwen3_5", "qwen3_5_images", "qwen2_vl")

# LLaVA reads the last but one layer of its tower, and Gemma 3 has no use for its tower's head.
_LLAVA_UNUSED = (".vision_tower.encoder.layers.1.", ".vision_tower.post_layernorm.")
UNUSED = {"llava": _LLAVA_UNUSED, "llava_next": _LLAVA_UNUSED, "gemma3": (".vision_tower.head.",)}
"""Parts of a model that its forward does not use."""


def families_with_critics() -> list:
    """Each critic in turn with the families that other tests train, and every critic with the others."""
    cases = []
    for index, name in enumerate(TRIED_FAMILIES):
        for critic in CRITICS:
            fast = name in NEW_FAMILIES or critic == list(CRITICS)[index % len(CRITICS)]
            cases.append(pytest.param(name, critic, marks=() if fast else pytest.mark.slow))
    return cases


def row_alone(trainer: SAPOTrainer, row: dict, completion: list[int]) -> dict[str, torch.Tensor]:
    """Inputs of one row by its processor, without padding or neighbours."""
    processing, images = trainer.processing_class, row.get("images")
    prompt = prepare_multimodal_messages(row["prompt"], images=images) if images else row["prompt"]
    text = processing.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = dict(processing(text=[text], return_tensors="pt", **({"images": [images]} if images else {})))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)), value=value)
    return inputs


def values_alone(trainer: SAPOTrainer, policy: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Values after every position, with models' own forwards."""
    critic = trainer.critic.value_head
    if critic.reads:
        hidden = policy(**inputs, output_hidden_states=True).hidden_states
        return critic(hidden_states=[hidden[depth] for depth in critic.depths(policy)])[0]
    if critic.mode == "adapter":
        policy = copy.deepcopy(policy)
        policy.set_adapter("critic")
        backbone = policy.get_base_model().base_model
    else:
        backbone = critic.backbone
    return critic.head(backbone(**inputs).last_hidden_state).squeeze(-1)[0]


class Alone(RolloutCallback):
    """Compares every rollout with plain forwards of the models as they are then."""

    def __init__(self):
        self.trainer: SAPOTrainer
        self.rollouts = 0

    @torch.no_grad()
    def on_rollout(self, args, state, control, rollout, metrics):
        policy, rows = self.trainer.accelerator.unwrap_model(self.trainer.model), list(self.trainer.train_dataset)
        training = policy.training
        policy.eval()
        # A tree's edge starts within its response, and a tree without enough edges leaves rows empty.
        filled = rollout.segments.mask.any(dim=1)
        assert filled.any() and (filled.all() or args.critic == "tree"), filled
        for index in filled.nonzero().flatten().tolist():
            mask = rollout.segments.mask[index]
            prompt = self.trainer.tokenizer.decode(rollout.prompt_ids[index])
            (row,) = (row for row in rows if row["prompt"][0]["content"] in prompt)
            length = int(mask.nonzero().max()) + 1
            completion, own = rollout.completion_ids[index, :length].tolist(), mask[:length]
            inputs = row_alone(self.trainer, row, completion)
            logits = policy(**inputs).logits[0, -length - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            torch.testing.assert_close(rollout.logps[index][mask], expected[own], rtol=0, atol=5e-6)
            if args.critic in LEARNED_CRITICS:
                expected = values_alone(self.trainer, policy, inputs)[-length - 1 : -1]
                torch.testing.assert_close(rollout.values[index][mask], expected[own], rtol=0, atol=5e-6)
        policy.train(training)
        self.rollouts += 1


def family_trainer(family: TriedFamily, critic: str, output_dir) -> tuple[SAPOTrainer, Alone]:
    model, callback = family.build_model(), Alone()
    if critic == "adapter":
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=list(family.lora_targets), init_lora_weights=False)
        model = get_peft_model(model, config)
    dataset = pictured_prompts([0, 1, 2, 1])
    trainer = SAPOTrainer(
        model,
        length_reward,
        sapo_config(
            output_dir,
            critic=critic,
            num_mini_batches=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            beta=0.0,
            **CRITICS[critic],
        ),
        train_dataset=dataset if family.takes_images else dataset.remove_columns("images"),
        processing_class=family.processing_class,
        callbacks=[callback],
    )
    callback.trainer = trainer
    return trainer, callback


def all_parameters(trainer: SAPOTrainer) -> dict[str, torch.nn.Parameter]:
    """The policy's and the critic's."""
    critic = () if trainer.critic is None else trainer.critic.value_head.learned_parameters()
    return {**dict(trainer.model.named_parameters()), **{f"value_head.{name}": p for name, p in critic}}


@pytest.mark.parametrize(("name", "critic"), families_with_critics())
def test_rollouts_of_a_training_are_those_of_each_row_alone(name, critic, tmp_path):
    """And so are the values of a learned critic. Sampled values have no plain forward."""
    trainer, alone = family_trainer(tried_family(name), critic, tmp_path)
    parameters = all_parameters(trainer)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # The critic's adapter is part of the policy, and requires no gradient outside of the critic's forwards.
    learned = {n for n, p in parameters.items() if p.requires_grad or n.startswith("value_head.") or ".critic." in n}
    unused = UNUSED.get(name, ())
    trainer.train()
    # The second rollout is that of trained models.
    assert alone.rollouts == 2
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in learned if not any(part in f".{name}" for part in unused)}
    if critic in LEARNED_CRITICS:
        assert any("critic" in name or name.startswith("value_head.") for name in moved)


@pytest.mark.parametrize("name", [name for name in TRIED_FAMILIES if tried_family(name).takes_images])
def test_another_picture_gives_other_log_probabilities(name, tmp_path):
    """Without this, a model that is blind by its initialisation would pass the test above."""
    trainer, _ = family_trainer(tried_family(name), "none", tmp_path)
    row = list(trainer.train_dataset)[1]
    with torch.no_grad():
        logps = [
            trainer.model.eval()(**row_alone(trainer, {**row, "images": [image]}, [30])).logits.log_softmax(-1)
            for image in (picture(1, 56, 28), picture(2, 56, 28))
        ]
    assert (logps[0] - logps[1])[0, -1].abs().max() > 1e-4


def test_documented_table_has_the_tested_families_and_critics():
    lines = (Path(__file__).parents[2] / "docs" / "faq.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| Family |"))
    header, _, *rows = lines[start : lines.index("", start)]
    quoted = [f'`"{critic}"`' for critic in CRITICS]
    cells = [["Family", *quoted], *([name, *["yes"] * len(CRITICS)] for name in TRIED_FAMILIES.values())]
    assert [header, *rows] == [f"| {' | '.join(row)} |" for row in cells]
    assert set(TRIED_FAMILIES) == {*FAMILIES, *QWEN_FAMILIES, *VISION_FAMILIES}
