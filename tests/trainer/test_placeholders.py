"""A policy that writes the placeholder of an image: its response is cut there, scored and learned from as sampled."""

import copy
import math

import pytest
import torch
from transformers import Qwen2Config
from trl import prepare_multimodal_messages

from sapo_trl import SAPOTrainer
from sapo_trl.rollouts import grow_tree
from sapo_trl.rollouts.placeholders import cut_rollout, cut_turn, length_until_placeholder, placeholder_ids
from sapo_trl.trainer.trl import bridge
from tests.testing_utils import Recorder, fixed_rollout, logged, never_logged, sapo_trainer, state_of


VISION = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
QWEN2_5_VL = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def image_id(family) -> int:
    return family.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def eager_model(family):
    """A policy that begins about every second response with an image placeholder; the rest is anything at all."""
    model, placeholder = family.build_model(), image_id(family)
    if not family.takes_images:
        return model
    prompt = family.processing_class.apply_chat_template(
        [with_image(row) for row in family.dataset(1)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        state = model.base_model(**prompt).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        # As likely as all other tokens together, at this state and at those that are like it.
        model.lm_head.weight[placeholder] = state * math.log(len(family.tokenizer)) / state.dot(state)
    return model


def eager_trainer(family, output_dir, trainer_kwargs=None, **settings) -> tuple[SAPOTrainer, Recorder, list]:
    recorder, seen = Recorder(), []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(zip(completion_ids, [completion[0]["content"] for completion in completions], strict=True))
        return [len(ids) / 8 for ids in completion_ids]

    trainer = sapo_trainer(
        family,
        output_dir,
        model=eager_model(family),
        trainer_kwargs={"reward_funcs": reward, "callbacks": [recorder], **(trainer_kwargs or {})},
        # With transformers TRL never samples the placeholder, unless it is told otherwise.
        generation_kwargs={"suppress_tokens": None},
        **{"max_steps": 4, "learning_rate": 1e-3, "critic_learning_rate": 1e-3, **settings},
    )
    return trainer, recorder, seen


class TestPlaceholderIds:
    @VISION
    def test_of_vision_language_models(self, family):
        tokens = ["<|image_pad|>"]
        assert placeholder_ids(family.build_model().config) == set(family.tokenizer.convert_tokens_to_ids(tokens))

    def test_a_text_model_has_none(self):
        assert placeholder_ids(Qwen2Config()) == frozenset()


class TestCutting:
    def test_up_to_and_including_the_first(self):
        assert length_until_placeholder([1, 2, 9, 3, 9], {9}) == 3
        assert length_until_placeholder([9], {9}) == 1
        assert length_until_placeholder([1, 2], {9}) == 2
        assert length_until_placeholder([], {9}) == 0
        assert (
            length_until_placeholder([1, 9, 2, 9], {9}, sampled=[1, 0, 1, 1]) == 4
        )  # the environment wrote the first

    def test_everything_that_belongs_to_a_response_is_cut_alike(self):
        output = {
            "prompt_ids": [[9, 9, 1], [1]],
            "completion_ids": [[1, 9, 2], [3, 4]],
            "logprobs": [[-1.0, -2.0, -3.0], [-4.0, -5.0]],
            "env_mask": [[1, 1, 1], [1, 0]],
            "answer": ["a", "b"],
        }
        assert cut_rollout(output, {9}) == {
            **output,
            "completion_ids": [[1, 9], [3, 4]],
            "logprobs": [[-1.0, -2.0], [-4.0, -5.0]],
            "env_mask": [[1, 1], [1, 0]],
        }
        without = {"prompt_ids": [[1]], "completion_ids": [[9, 9]], "logprobs": None}
        assert cut_rollout(without, {9}) == {**without, "completion_ids": [[9]]}


class TestTraining:
    @VISION
    @pytest.mark.parametrize("critic", ["separate", "shared"])
    def test_a_run_goes_on_and_responses_end_at_their_first_placeholder(self, family, critic, tmp_path):
        trainer, recorder, seen = eager_trainer(family, tmp_path, critic=critic, beta=0.1)
        before = state_of(trainer.model)
        trainer.train()
        placeholder, pad = image_id(family), family.tokenizer.pad_token_id
        cut, responses = 0, 0
        for rollout in recorder.rollouts:
            for ids, segment_ids in zip(rollout.completion_ids.tolist(), rollout.segments.ids.tolist(), strict=True):
                length = sum(segment >= 0 for segment in segment_ids)
                assert placeholder not in ids[: length - 1] and set(ids[length:]) <= {pad}
                cut += ids[length - 1] == placeholder
                responses += 1
        assert 0 < cut < responses
        assert sum(ids[-1] == placeholder for ids, _ in seen) == cut
        assert not any("<|image_pad|>" in text for _, text in seen)
        # They did not end by themselves, and the log says so.
        shares = logged(trainer, "completions/placeholder_ratio")
        assert sum(shares) / len(shares) == pytest.approx(cut / responses)
        assert all(a <= b for a, b in zip(shares, logged(trainer, "completions/clipped_ratio"), strict=True))
        assert logged(trainer, "skipped_steps") == [0] * 4
        assert all(math.isfinite(value) for value in logged(trainer, "policy_loss"))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in state_of(trainer.model).items())

    @VISION
    def test_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(self, family, tmp_path):
        """Also of the placeholder itself, against plain forwards of each prompt and what came before the token."""
        trainer, recorder, _ = eager_trainer(family, tmp_path, max_steps=1, learning_rate=0.0, beta=0.0)
        plain = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
        plain.forward = type(plain).forward.__get__(plain)  # without TRL's fused head
        trainer.train()
        rollout, placeholder = recorder.rollouts[0], image_id(family)
        checked = 0
        for batch in trainer.micro_batches:
            images = split_images(batch)
            for row, ids in enumerate(batch["completion_ids"].tolist()):
                length = int(batch["completion_mask"][row].sum())
                if ids[length - 1] != placeholder:
                    continue
                prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
                # Its last token is predicted from all that precedes it, which holds no placeholder but the prompt's.
                sequence = torch.cat([prompt, torch.tensor(ids[: length - 1], dtype=torch.long)])[None]
                with torch.no_grad():
                    logits = plain(
                        input_ids=sequence,
                        attention_mask=torch.ones_like(sequence),
                        mm_token_type_ids=(sequence == placeholder).long(),
                        **images[row],
                    ).logits
                found = batch["old_per_token_logps"][row, length - 1]
                expected = logits[0, -1].float().log_softmax(-1)[placeholder]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
                assert bool(batch["policy_mask"][row, length - 1])
                checked += 1
        assert checked > 0 and rollout.logps.isfinite().all()

    @QWEN2_5_VL
    def test_without_the_guard_the_forward_refuses(self, family, tmp_path, monkeypatch):
        """What it is there for; fails when transformers no longer minds, and the guard can go."""
        monkeypatch.setattr(bridge, "placeholder_ids", lambda config: frozenset())
        trainer, _, _ = eager_trainer(family, tmp_path)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            trainer.train()

    @QWEN2_5_VL
    @pytest.mark.parametrize("masked", [False, True])
    def test_a_rollout_function_and_its_log_probabilities(self, family, masked, tmp_path):
        """Those of a sampler that said the same as the policy leave nothing to correct, wherever it was cut."""
        placeholder = image_id(family)
        sampled = [[30, 31, placeholder, 40], [placeholder, placeholder], [30, 31, 32], [35, placeholder]]
        rollout = fixed_rollout(
            lambda prompts, trainer: sampled[: len(prompts)],
            logprobs=lambda prompts, completions: [[-math.log(1e3)] * len(ids) for ids in completions],
        )
        trainer, recorder, seen = eager_trainer(
            family,
            tmp_path,
            max_steps=2,
            mask_truncated_completions=masked,
            max_sampler_logp_difference=1e9,
            trainer_kwargs={"rollout_func": rollout},
        )
        trainer.train()
        assert [ids for ids, _ in seen] == [[30, 31, placeholder], [placeholder], [30, 31, 32], [35, placeholder]]
        lengths = (recorder.rollouts[0].segments.ids >= 0).sum(1).tolist()
        assert lengths == ([0, 0, 0, 0] if masked else [3, 1, 3, 2])
        assert logged(trainer, "completions/placeholder_ratio") == [0.75]
        assert logged(trainer, "skipped_steps") == [0, 0]

    @QWEN2_5_VL
    @pytest.mark.parametrize(
        "settings",
        [
            {"critic": "monte_carlo", "num_continuations": 2},
            {
                "critic": "tree",
                "segmentation": "sequence",
                "num_generations": 2,
                "tree_widths": [2, 2],
                "tree_segment_length": 3,
                "beta": 0.0,
            },
        ],
    )
    def test_continuations_do_not_go_on_behind_a_placeholder(self, family, settings, tmp_path):
        trainer, recorder, _ = eager_trainer(family, tmp_path, max_steps=3, **settings)
        prefixes = []
        generate = trainer.continuations.generate

        def spy(prompts, *args):
            prefixes.extend(prompts.ids)
            return generate(prompts, *args)

        trainer.continuations.generate = spy
        trainer.train()
        assert prefixes and logged(trainer, "skipped_steps") == [0, 0, 0]
        start = family.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        for ids in prefixes:
            assert image_id(family) not in ids[ids.index(start) :]
        assert sum(logged(trainer, "completions/placeholder_ratio")) > 0

    @TEXT_FAMILY
    def test_a_text_model_writes_any_token(self, family, tmp_path):
        """It has the token, but no images."""
        placeholder = image_id(family)
        rollout = fixed_rollout(lambda prompts, trainer: [[placeholder, 30]] * len(prompts))
        trainer, recorder, _ = eager_trainer(family, tmp_path, trainer_kwargs={"rollout_func": rollout}, max_steps=1)
        trainer.train()
        assert recorder.rollouts[0].completion_ids.tolist() == [[placeholder, 30]] * 4
        assert never_logged(trainer, "completions/placeholder_ratio")


class TestTools:
    @QWEN2_5_VL
    def test_a_turn_that_may_go_on_ends_before_the_placeholder(self, family):
        placeholder = image_id(family)
        ids, logps = cut_turn(
            [[30, placeholder, 31], [placeholder, 30], [30, 31]],
            [[-1.0, -2.0, -3.0], [-1.0, -2.0], [-1.0] * 2],
            {placeholder},
            may_go_on=True,
        )
        assert ids == [[30], [placeholder], [30, 31]] and logps == [[-1.0], [-1.0], [-1.0, -1.0]]


def test_a_tree_does_not_grow_behind_a_placeholder():
    from tests.rollouts.test_rollouts import Counter, sampler

    class Breaking(Counter):
        def generate(self, prompts, max_new_tokens):
            super().generate(prompts, max_new_tokens)
            return [[9] if ids[-1] == 2 else [4, 5] for ids in prompts.ids]

    counter = Breaking()
    tree = grow_tree(sampler(counter, [[1], [2]], breaking_token_ids=frozenset([9])), [0, 1], [2, 2], 2)
    assert [tree.prefix(leaf) for leaf in tree.leaves if tree.rows[leaf] == 1] == [[9], [9]]
    assert all(9 not in ids for prompts, _ in counter.calls for ids in prompts)


def with_image(row: dict) -> list[dict]:
    return prepare_multimodal_messages(row["prompt"], images=row["images"])


def split_images(batch) -> list[dict[str, torch.Tensor]]:
    """Each row's images, cut out of the batch by hand."""
    rows, image, patch = [], 0, 0
    for number in batch["num_images"]:
        grid = batch["image_grid_thw"][image : image + number]
        patches = int(grid.prod(1).sum())
        rows.append({"image_grid_thw": grid, "pixel_values": batch["pixel_values"][patch : patch + patches]})
        image, patch = image + number, patch + patches
    return rows
