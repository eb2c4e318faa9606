"""Bad input: a clear error before training, or where it happens, that names the field and its value."""

import functools
import logging
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from sapo_trl import SAPOTrainer, Segments, SegmentValueHead
from sapo_trl.embedded import build_tokenizer, make_problems
from sapo_trl.segmentation import TokenSegmenter
from sapo_trl.trainer.checks import (
    check_finite_rewards,
    check_finite_weights,
    check_images,
    check_padding_side,
    check_prompt_column,
    check_segments,
)
from sapo_trl.trainer.setup import check_same_tokenizer, check_value_model
from tests.testing_utils import Family, length_reward, sapo_config, sapo_trainer, state_of, text_dataset, unmoved


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
IMAGE_FAMILIES = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)


class TestPromptColumn:
    def test_missing_column_is_named_with_those_there(self):
        with pytest.raises(ValueError, match=r"`train_dataset` needs a column `prompt`; it has \['question'\]"):
            check_prompt_column(Dataset.from_dict({"question": ["x"]}), "train_dataset")

    def test_raw_problems_get_a_hint(self):
        with pytest.raises(ValueError, match=r"`problem`.*`sapo_trl.data`"):
            check_prompt_column(make_problems(2), "train_dataset")

    @pytest.mark.parametrize("column_names_known", [True, False])
    def test_stream(self, column_names_known):
        def stream(column):
            dataset = IterableDataset.from_generator(lambda: iter([{column: "x"}]))
            return Dataset.from_dict({column: ["x"]}).to_iterable_dataset() if column_names_known else dataset

        check_prompt_column(stream("prompt"), "train_dataset")
        with pytest.raises(ValueError, match="`train_dataset` needs a column `prompt`"):
            check_prompt_column(stream("text"), "train_dataset")

    def test_no_rows(self):
        with pytest.raises(ValueError, match="`eval_dataset` has no rows"):
            check_prompt_column(Dataset.from_dict({"prompt": []}), "eval_dataset")

    @TEXT_FAMILY
    def test_in_the_trainer_for_every_data_set(self, family, tmp_path):
        bad = Dataset.from_dict({"question": ["x"]})
        with pytest.raises(ValueError, match="`train_dataset` needs a column `prompt`"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": bad})
        with pytest.raises(ValueError, match="`eval_dataset` needs a column `prompt`"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"eval_dataset": bad})
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` needs a column `prompt`"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"eval_dataset": {"a": text_dataset(), "b": bad}})


class TestRewards:
    def test_infinite_reward_of_a_model_or_environment(self):
        check_finite_rewards(torch.tensor([[0.0, float("nan")]]), ["a", "b"])
        with pytest.raises(ValueError, match="`b` returned -inf for completion 1 of 2"):
            check_finite_rewards(torch.tensor([[0.0, 1.0], [0.0, -float("inf")]]), ["a", "b"])

    @TEXT_FAMILY
    @pytest.mark.parametrize(
        ("rewards", "message"),
        [
            ([1.0, 2.0], "`score` returned 2 rewards for 4 completions"),
            ([1.0, 2.0, float("inf"), 4.0], "`score` returned inf for completion 2 of 4"),
        ],
    )
    @pytest.mark.parametrize("kind", ["sync", "async"])
    def test_in_the_trainer_before_the_first_update(self, family, rewards, message, kind, tmp_path):
        if kind == "sync":

            def score(completions, **kwargs):
                return rewards

        else:

            async def score(completions, **kwargs):
                return rewards

        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"reward_funcs": score})
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


class TestSegmenter:
    MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()

    def test_every_partition_of_the_mask_passes(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            mask = torch.rand(3, 6, generator=generator) < 0.7
            check_segments(Segments.from_last_tokens(torch.rand(3, 6, generator=generator) < 0.4, mask), mask)

    def test_not_segments(self):
        with pytest.raises(TypeError, match="must return `Segments`, got Tensor"):
            check_segments(torch.zeros(2, 4), self.MASK)

    def test_wrong_shape(self):
        with pytest.raises(ValueError, match=r"shape \(2, 4\), got \(2, 3\)"):
            check_segments(Segments(torch.zeros(2, 3, dtype=torch.long)), self.MASK)

    def test_tokens_left_out_and_positions_too_many(self):
        ids = torch.tensor([[0, 0, 1, -1], [0, -1, 0, 1]])
        with pytest.raises(ValueError, match="in row 1 of 2, 1 completion tokens .* and 2 other positions"):
            check_segments(Segments(ids), self.MASK)

    @pytest.mark.parametrize("row", [[1, 1, 2, -1], [0, 2, 2, -1], [0, 1, 0, -1], [1, 0, 1, -1]])
    def test_ids_that_do_not_count_up(self, row):
        ids = torch.tensor([row, [0, 0, -1, -1]])
        with pytest.raises(ValueError, match=rf"row 0 has \[{row[0]}, {row[1]}, {row[2]}\]"):
            check_segments(Segments(ids), self.MASK)

    @TEXT_FAMILY
    def test_in_the_trainer_before_the_first_update(self, family, tmp_path):
        def forgetful(entropies, mask):
            return Segments.from_last_tokens(mask, mask & (torch.arange(mask.size(1)) > 0))

        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": forgetful})
        with pytest.raises(ValueError, match="does not cover the mask: in row 0 of 4, 1 completion"):
            trainer.train()
        assert trainer.state.global_step == 0


class Rows(IterableDataset):
    """A stream of rows as they are, pictures included, which a table would encode."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class TestImages:
    def prompts(self, family: Family, text: str, num_images: int = 1, placeholders: int = 1) -> Dataset:
        image = family.dataset(1)[0]["images"][0]
        content = [{"type": "image"}] * placeholders + [{"type": "text", "text": text}]
        row = {"prompt": [{"role": "user", "content": content}], "images": [image] * num_images, "answer": "1"}
        return Dataset.from_list([family.dataset(1)[0], row], features=family.dataset(1).features)

    @IMAGE_FAMILIES
    def test_right_prompts_pass(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        check_images(family.dataset(), family.processing_class, trainer.model)
        check_images(self.prompts(family, "x", 3, 3), family.processing_class, trainer.model)

    @IMAGE_FAMILIES
    def test_image_token_written_out_in_the_text(self, family, tmp_path):
        dataset = self.prompts(family, "Find<|image_pad|> AB.")
        with pytest.raises(ValueError, match=r"Row 1 of the data set has 1 image\(s\).*2 <\|image_pad\|> tokens"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": dataset})

    @IMAGE_FAMILIES
    def test_image_token_written_out_in_a_prompt_without_image(self, family, tmp_path):
        dataset = self.prompts(family, "Find<|image_pad|> AB.", 0, 0)
        with pytest.raises(ValueError, match=r"Row 1 of the data set has 0 image\(s\)"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": dataset})

    @IMAGE_FAMILIES
    @pytest.mark.parametrize("without", [[], None])
    def test_prompts_without_image_pass(self, family, without, tmp_path):
        text = [{"role": "user", "content": [{"type": "text", "text": "Find AB."}]}]
        rows = [{"prompt": text, "images": without}, {"prompt": [{"role": "user", "content": "Find AB."}]}]
        for row in rows:
            check_images(Rows([row]), family.processing_class, family.build_model())

    @IMAGE_FAMILIES
    def test_images_within_the_messages(self, family, tmp_path):
        image = family.dataset(1)[0]["images"][0]
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Find AB."}]
        rows = [{"prompt": [{"role": "user", "content": content}]}]
        check_images(Rows(rows), family.processing_class, family.build_model())
        rows[0]["prompt"][0]["content"].append({"type": "text", "text": "<|image_pad|>"})
        with pytest.raises(ValueError, match="Row 0 of the data set"):
            check_images(Rows(rows), family.processing_class, family.build_model())

    @IMAGE_FAMILIES
    @pytest.mark.parametrize(("num_images", "placeholders"), [(2, 1), (1, 2), (1, 0), (0, 1)])
    def test_images_and_placeholders_that_do_not_pair(self, family, num_images, placeholders, tmp_path):
        dataset = self.prompts(family, "Find AB.", num_images, placeholders)
        with pytest.raises(ValueError, match=rf"Row 1 of the data set has {num_images} image\(s\)"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": dataset})

    def test_processor_of_another_model(self, tmp_path, tokenizer, qwen2_5_vl_processor, qwen3_vl_processor):
        """Qwen3-VL's processor merges and cuts other patches than Qwen2.5-VL's model."""
        from tests.testing_utils import FAMILIES

        family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
        model = family.build_model()
        model.config.vision_config.spatial_merge_size = 4
        with pytest.raises(ValueError, match="merge size 4.*processor must belong to the model"):
            sapo_trainer(family, tmp_path, model=model)

    @TEXT_FAMILY
    def test_text_models_are_not_asked(self, family, tmp_path):
        check_images(family.dataset(), family.processing_class, family.build_model())


class TestTokenizers:
    def test_padding_side_is_set_with_a_warning(self, qwen2_5_vl_processor, caplog):
        tokenizer = qwen2_5_vl_processor.tokenizer
        tokenizer.padding_side = "right"
        with caplog.at_level(logging.WARNING, logger="sapo_trl"):
            check_padding_side(qwen2_5_vl_processor)
        assert tokenizer.padding_side == "left"
        assert "pads on the right" in caplog.text
        caplog.clear()
        check_padding_side(tokenizer)
        assert not caplog.records

    def test_another_tokenizer(self, tokenizer):
        from sapo_trl.embedded import build_tokenizer

        other = build_tokenizer()
        check_same_tokenizer(other, tokenizer, "critic")
        other.add_tokens(["<extra>"])  # more tokens do no harm
        check_same_tokenizer(other, tokenizer, "critic")
        with pytest.raises(ValueError, match=r"'critic' has another tokenizer.*1 of \d+ tokens.*'<extra>'"):
            check_same_tokenizer(tokenizer, other, "critic")

    @TEXT_FAMILY
    def test_in_the_trainer(self, family, tmp_path, tokenizer):
        from sapo_trl.embedded import build_tokenizer

        other = build_tokenizer()
        vocabulary = other.get_vocab()
        swapped = {"!": vocabulary["#"], "#": vocabulary["!"]}
        family.build_model().save_pretrained(tmp_path / "value")
        other.save_pretrained(tmp_path / "value")
        file = tmp_path / "value" / "tokenizer.json"
        import json

        content = json.loads(file.read_text())
        content["model"]["vocab"] |= swapped
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="has another tokenizer than the policy: 2 of"):
            sapo_trainer(family, tmp_path / "run", trainer_kwargs={"value_model": str(tmp_path / "value")})
        tokenizer.save_pretrained(tmp_path / "value")
        sapo_trainer(family, tmp_path / "run", trainer_kwargs={"value_model": str(tmp_path / "value")})


class TestValueModel:
    def test_vocabulary(self, tokenizer):
        from tests.testing_utils import FAMILIES

        family = FAMILIES["qwen2"](tokenizer)
        policy, other = family.build_model(), family.build_model()
        other.resize_token_embeddings(len(tokenizer) + 8)
        with pytest.raises(
            ValueError, match=f"vocabulary has {len(tokenizer) + 8} entries, the policy's {len(tokenizer)}"
        ):
            check_value_model(SegmentValueHead.from_policy(other), policy, tokenizer)

    def test_architectures_that_do_not_fit(self, tokenizer, qwen2_5_vl_processor, qwen3_vl_processor):
        from tests.testing_utils import FAMILIES

        text = FAMILIES["qwen2"](tokenizer).build_model()
        qwen2_5 = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor).build_model()
        qwen3 = FAMILIES["qwen3_vl"](qwen3_vl_processor).build_model()
        with pytest.raises(ValueError, match=r"\(qwen2\) and the policy \(qwen2_5_vl\).*`image_token_id` is None"):
            check_value_model(SegmentValueHead.from_policy(text), qwen2_5, tokenizer)
        with pytest.raises(ValueError, match=r"`patch_size` is 16 and 14"):
            check_value_model(SegmentValueHead.from_policy(qwen3), qwen2_5, tokenizer)
        check_value_model(SegmentValueHead.from_policy(qwen2_5), qwen2_5, tokenizer)

    @TEXT_FAMILY
    def test_in_the_trainer(self, family, tmp_path, qwen2_5_vl_processor):
        from tests.testing_utils import FAMILIES

        make = functools.partial(sapo_trainer, family, tmp_path)
        image_model = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor).build_model()
        with pytest.raises(ValueError, match=r"\(qwen2_5_vl\) and the policy \(qwen2\)"):
            make(trainer_kwargs={"value_model": image_model})
        with pytest.raises(ValueError, match="size 64, but the policy's have size 16"):
            head = SegmentValueHead.from_policy(image_model, mode="shared")
            make(critic="shared", trainer_kwargs={"value_model": head})
        with pytest.raises(ValueError, match="`value_model` is a 'separate' critic, but `critic='shared'`"):
            head = SegmentValueHead.from_policy(family.build_model())
            make(critic="shared", trainer_kwargs={"value_model": head})
        with pytest.raises(ValueError, match="a critic of mode 'shared' is none: leave `value_model` out"):
            make(critic="shared", trainer_kwargs={"value_model": family.build_model()})
        with pytest.raises(ValueError, match="`value_model` was given, but `critic='none'`"):
            make(critic="none", trainer_kwargs={"value_model": family.build_model()})

    @TEXT_FAMILY
    def test_value_models_that_fit(self, family, tmp_path):
        value_model = family.build_model(seed=1)
        for given in (value_model, SegmentValueHead.from_policy(value_model)):
            trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"value_model": given})
            ours = trainer.critic.value_head.backbone.embed_tokens.weight
            assert torch.equal(ours, value_model.model.embed_tokens.weight)

    def test_quantized_policy(self, tmp_path):
        with pytest.raises(ValueError, match='quantized policy.*critic="shared".*`value_model`'):
            SAPOTrainer(
                model="unused", reward_funcs=length_reward, args=sapo_config(tmp_path), quantization_config=object()
            )


@TEXT_FAMILY
def test_data_set_smaller_than_a_rollout(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"train_dataset": family.dataset(3)})
    with pytest.raises(ValueError, match=r"`train_dataset` has 3 rows, but one rollout takes 4 prompts"):
        trainer.train()


@IMAGE_FAMILIES
def test_images_without_a_processor(family, tmp_path):
    with pytest.raises(ValueError, match="pass the model's processor"):
        sapo_trainer(family, tmp_path, trainer_kwargs={"processing_class": family.tokenizer})


@TEXT_FAMILY
@pytest.mark.parametrize("returned", [None, 1.0, ["1", "2", "3", "4"]])
def test_reward_function_that_returns_no_numbers(family, tmp_path, returned):
    def forgetful_reward(**kwargs):
        return returned

    trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"reward_funcs": forgetful_reward})
    with pytest.raises(ValueError, match="`forgetful_reward` must return a list with a number"):
        trainer.train()


@TEXT_FAMILY
@pytest.mark.parametrize("segmenter", [TokenSegmenter, "token"])
def test_segmenter_that_is_no_instance(family, tmp_path, segmenter):
    with pytest.raises(TypeError, match="`segmenter` must be a callable"):
        sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": segmenter})


@TEXT_FAMILY
@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("damaged", ["policy", "critic"])
def test_weights_that_are_no_numbers(family, tmp_path, damaged, weight):
    model, critic = family.build_model(), family.build_model(1)
    {"policy": model, "critic": critic}[damaged].model.layers[1].mlp.up_proj.weight.data[0, :2] = weight
    trainer = sapo_trainer(family, tmp_path, model=model, trainer_kwargs={"value_model": critic})
    with pytest.raises(
        ValueError, match=rf"The {damaged} has 2 of 512 weights that are NaN .*'.*layers.1.mlp.up_proj"
    ):
        trainer.train()


def test_large_weights_are_numbers():
    """Their sum overflows, they do not."""
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight.data.fill_(3e38)
    check_finite_weights(module, "The policy")


@TEXT_FAMILY
class TestLargerTokenizer:
    """One with tokens that the policy has no embedding of; tokens that never occur do no harm, as in Gemma 3."""

    @pytest.fixture
    def larger(self):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        return tokenizer

    def test_token_that_never_occurs(self, family, larger, tmp_path):
        sapo_trainer(family, tmp_path, max_steps=1, trainer_kwargs={"processing_class": larger}).train()

    def test_token_in_a_prompt(self, family, larger, tmp_path):
        dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "<extra>"}]] * 8})
        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"processing_class": larger, "train_dataset": dataset})
        size = len(larger) - 1
        with pytest.raises(ValueError, match=rf"A prompt has the token id {size}, .* embeddings of {size} tokens"):
            trainer.train()

    def test_padding(self, family, larger, tmp_path):
        model = family.build_model()
        larger.pad_token = "<extra>"
        with pytest.raises(ValueError, match=r"`pad_token` '<extra>' has the token id \d+, .*`model.resize_token"):
            sapo_trainer(family, tmp_path, model=model, trainer_kwargs={"processing_class": larger})


@TEXT_FAMILY
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": [[30], [], [30], [30]]}, "an empty list in row 1 of `completion_ids`: it needs at least"),
        ({"prompt_ids": [[5], [5], [5], []]}, "an empty list in row 3 of `prompt_ids`"),
        ({"completion_ids": [[30]] * 3}, "returned 3 rows of `completion_ids` for 4 prompts"),
        ({"completion_ids": [[30, 9999]] * 4}, "Row 0 of `completion_ids` from `rollout_func` has the token id 9999"),
        ({"completion_ids": [[30], [-1], [30], [30]]}, "Row 1 of `completion_ids` from `rollout_func` has the .* -1;"),
        ({"completion_ids": ["ab"] * 4}, "Row 0 of `completion_ids` .* must be a list of token ids, got 'ab'"),
        ({"completion_ids": [[30.5]] * 4}, r"Row 0 of `completion_ids` .* must be a list of token ids, got \[30.5\]"),
        ({"completion_ids": torch.full((4, 2), 30)}, "one row for each prompt as `completion_ids`, got a Tensor"),
        (None, "must return a dictionary with .*, got a NoneType"),
        ({"logprobs": [[-1.0, -1.0]] * 4}, "2 values of `logprobs` for the 1 tokens of completion 0"),
        ({"env_mask": [[1], [1], [1, 1], [1]]}, "2 values of `env_mask` for the 1 tokens of completion 2"),
    ],
)
def test_what_a_rollout_function_returns(family, tmp_path, change, message):
    def rollout(prompts, trainer):
        rows = len(prompts)
        usual = {"prompt_ids": [[5]] * rows, "completion_ids": [[30]] * rows, "logprobs": None}
        return None if change is None else usual | change

    trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"rollout_func": rollout})
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()


@TEXT_FAMILY
class TestAdapterName:
    """TRL's reference is a copy of the adapter "default", whichever is trained."""

    @pytest.mark.parametrize("others", [[], ["default"]])
    def test_another_adapter_with_a_reference(self, family, tmp_path, others):
        config = LoraConfig(r=2, target_modules="all-linear")
        model = get_peft_model(family.build_model(), config, adapter_name="mine")
        for name in others:
            model.add_adapter(name, config)
        with pytest.raises(
            ValueError, match="active adapter is 'mine', and with beta=0.1 .*`adapter_name=\"default\"`"
        ):
            sapo_trainer(family, tmp_path, model=model, beta=0.1)

    @pytest.mark.parametrize(("name", "beta"), [("mine", 0.0), ("default", 0.1)])
    def test_otherwise_it_trains(self, family, tmp_path, name, beta):
        model = get_peft_model(family.build_model(), LoraConfig(r=2, target_modules="all-linear"), adapter_name=name)
        trainer = sapo_trainer(family, tmp_path, model=model, beta=beta, critic="shared", max_steps=1)
        before = state_of(trainer.model)
        trainer.train()
        names = {n for n in before if f".{name}." in n and "lora_B" in n}
        assert names and names.isdisjoint(unmoved(before, trainer.model))
