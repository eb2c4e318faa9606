"""Rows of like length together, moved to the right: less to compute, and the same results."""

import copy
from itertools import combinations, pairwise, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    Ministral3Config,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    set_seed,
)

from sapo_trl.distributed import gradients_are_in_pieces, weights_are_in_pieces
from sapo_trl.trainer.padding import (
    RightAligned,
    can_move_rows,
    common_cuts,
    cut_rows,
    equal_groups,
    group_rows,
    merge_rows,
    take_rows,
)
from tests.exact_arithmetic import exact_lm_head, make_exact
from tests.testing_utils import Recorder, fixed_rollout, random_completions, sapo_trainer


BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def tokens(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[row] for row in group) for group in groups)


def largest(lengths: list[int], groups: list[list[int]]) -> int:
    return max(tokens(lengths, [group]) for group in groups)


def partitions(rows: list[int], num_groups: int):
    """Every way to distribute rows over a number of groups, none of them empty."""
    if num_groups == 1:
        yield [rows]
        return
    first, rest = rows[0], rows[1:]
    for size in range(len(rest) - num_groups + 2):
        for others in combinations(rest, size):
            left = [row for row in rest if row not in others]
            for groups in partitions(left, num_groups - 1):
                yield [[first, *others], *groups]


class TestGroups:
    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_no_balanced_partition_has_fewer_tokens(self, data):
        lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
        num_groups = data.draw(st.integers(1, len(lengths)))
        limit = data.draw(st.none() | st.integers(1, 120))
        groups = group_rows(lengths, num_groups, limit)
        assert len(groups) == num_groups and all(groups)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))

        max_rows = 2 * -(-len(lengths) // num_groups)
        every = [
            partition
            for partition in partitions(list(range(len(lengths))), num_groups)
            if max(map(len, partition)) <= max_rows
        ]
        smallest = min(largest(lengths, partition) for partition in every)
        every = [partition for partition in every if largest(lengths, partition) <= 1.2 * smallest]
        allowed = [partition for partition in every if limit is None or largest(lengths, partition) <= limit]
        assert max(map(len, groups)) <= max_rows and largest(lengths, groups) <= 1.2 * smallest
        assert tokens(lengths, groups) == min(tokens(lengths, partition) for partition in allowed or every)

    @pytest.mark.parametrize("others", [[350] * 63, range(320, 383)], ids=["ties", "near-ties"])
    def test_no_group_takes_what_the_others_could(self, others):
        """One long response must not leave groups of a single short one, and another with half of all images."""
        groups = group_rows([2348, *others], 16, 4 * 2348)
        assert groups[0] == [0] and {len(group) for group in groups[1:]} == {4, 5}

    def test_the_longest_come_first_and_rows_of_equal_length_stay_in_order(self):
        assert group_rows([3, 9, 3, 9, 3], 2) == [[1, 3], [0, 2, 4]]
        assert equal_groups([3, 9, 3, 8, 5, 3], 3) == [[1, 3], [4, 0], [2, 5]]
        assert equal_groups([3, 9, 3, 8, 5, 3], 4) == [[1, 3], [4, 0], [2], [5]]

    @pytest.mark.parametrize("num_groups", [0, 3])
    def test_bad_numbers(self, num_groups):
        with pytest.raises(ValueError, match=f"num_groups={num_groups} must lie between 1 and the number of rows, 2"):
            group_rows([1, 2], num_groups)

    def test_log_normal_lengths_are_padded_by_less_than_5_percent(self):
        """64 responses in 16 micro-batches; of the 4 at a time that come as they are, more than a third is padding."""
        lengths = (np.random.default_rng(0).lognormal(5.5, 0.7, 64) + 200).astype(int).tolist()
        as_they_come = [list(range(first, first + 4)) for first in range(0, 64, 4)]
        assert 1 - sum(lengths) / tokens(lengths, as_they_come) > 1 / 4
        assert 1 - sum(lengths) / tokens(lengths, group_rows(lengths, 16)) < 0.05


def waited_for(lengths: list[list[int]], groups: list[list[list[int]]]) -> list[int]:
    """Of each group, the tokens of the process that has the most in its place."""
    return [
        max(tokens(own, [group]) for own, group in zip(lengths, of_processes, strict=True))
        for of_processes in zip(*groups, strict=True)
    ]


def fewest(candidates: list[list[int]], limit: int | None) -> int:
    """Tokens waited for, of candidates whose largest group is not too large: within 1.2 times, and within a limit."""
    smallest = min(max(candidate) for candidate in candidates)
    candidates = [candidate for candidate in candidates if max(candidate) <= 1.2 * smallest]
    allowed = [candidate for candidate in candidates if limit is None or max(candidate) <= limit]
    return min(sum(candidate) for candidate in allowed or candidates)


def lengths_of_processes(num_processes: int, most_rows: int) -> st.SearchStrategy[list[list[int]]]:
    """As many rows on each process, also some of very unequal lengths."""
    length = st.integers(1, 30) | st.sampled_from([1, 2, 30])
    return st.integers(1, most_rows).flatmap(
        lambda rows: st.lists(
            st.lists(length, min_size=rows, max_size=rows), min_size=num_processes, max_size=num_processes
        )
    )


class TestCommonCuts:
    @settings(deadline=None, max_examples=150)
    @given(st.integers(1, 4).flatmap(lambda processes: lengths_of_processes(processes, most_rows=8)), st.data())
    def test_no_other_common_cuts_have_processes_wait_for_fewer_tokens(self, lengths, data):
        num_rows = len(lengths[0])
        num_groups = data.draw(st.integers(1, num_rows))
        max_rows = 2 * -(-num_rows // num_groups)
        every = [[0, *between, num_rows] for between in combinations(range(1, num_rows), num_groups - 1)]
        every = [cuts for cuts in every if max(end - start for start, end in pairwise(cuts)) <= max_rows]
        candidates = [waited_for(lengths, [cut_rows(own, cuts) for own in lengths]) for cuts in every]
        limit = data.draw(st.sampled_from([None, 1, *sorted({max(candidate) for candidate in candidates})]))

        cuts = common_cuts(lengths, num_groups, limit)
        groups = [cut_rows(own, cuts) for own in lengths]
        for own, of_process in zip(lengths, groups, strict=True):
            assert sorted(row for group in of_process for row in group) == list(range(num_rows))
            assert [own[row] for group in of_process for row in group] == sorted(own, reverse=True)
        sizes = [[len(group) for group in of_process] for of_process in groups]
        assert all(of_process == sizes[0] for of_process in sizes)
        assert len(sizes[0]) == num_groups and min(sizes[0]) > 0 and max(sizes[0]) <= max_rows
        assert sum(waited_for(lengths, groups)) == fewest(candidates, limit)

    @settings(deadline=None, max_examples=50)
    @given(lengths_of_processes(2, most_rows=5), st.data())
    def test_rows_in_another_order_than_by_length_would_not_help(self, lengths, data):
        """Whichever rows two processes put together, if they have the same numbers of rows in their groups."""
        num_groups = data.draw(st.integers(1, len(lengths[0])))
        max_rows = 2 * -(-len(lengths[0]) // num_groups)
        every = [
            partition
            for partition in partitions(list(range(len(lengths[0]))), num_groups)
            if max(map(len, partition)) <= max_rows
        ]
        in_any_order = [order for partition in every for order in permutations(partition)]
        candidates = [
            waited_for(lengths, [first, second])
            for first, second in product(every, in_any_order)
            if [*map(len, first)] == [*map(len, second)]
        ]
        cuts = common_cuts(lengths, num_groups)
        assert sum(waited_for(lengths, [cut_rows(own, cuts) for own in lengths])) == fewest(candidates, None)

    def test_no_group_has_more_than_twice_its_share_of_rows(self):
        """Although all five rows of one token in one group, and each longer one by itself, would be a token less."""
        lengths = [[30, 9, 8, 1, 1, 1, 1, 1], [30, 5, 5, 1, 1, 1, 1, 1]]
        assert common_cuts(lengths, 4) == [0, 1, 3, 6, 8]

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_processes_with_the_same_lengths_cut_as_one_does(self, data):
        lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12))
        others = data.draw(st.permutations(lengths))
        num_groups = data.draw(st.integers(1, len(lengths)))
        limit = data.draw(st.none() | st.integers(1, 200))
        cuts = common_cuts([lengths, others, lengths], num_groups, limit)
        assert cut_rows(lengths, cuts) == group_rows(lengths, num_groups, limit)

    def test_each_process_alone_would_cut_elsewhere(self):
        lengths = [[9, 9, 1, 1], [9, 1, 1, 1]]
        alone = [group_rows(own, 2) for own in lengths]
        assert alone == [[[0, 1], [2, 3]], [[0], [1, 2, 3]]]
        together = [cut_rows(own, common_cuts(lengths, 2)) for own in lengths]
        assert together == [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
        assert (sum(waited_for(lengths, alone)), sum(waited_for(lengths, together))) == (21, 20)

    def test_one_process_cuts_as_it_did_before_there_were_several(self):
        """What `group_rows` made of these before it had anything to do with other processes."""
        lengths = (np.random.default_rng(1).lognormal(5.5, 0.7, 24) + 200).astype(int).tolist()
        groups = [[22], [23, 4, 1], [15, 7, 11, 5], [8, 0, 2, 9], [16, 10, 20, 13, 19], [21, 17, 14, 6, 12, 18, 3]]
        assert group_rows(lengths, 6) == groups
        groups = [[22], [23, 4, 1], [15, 7, 11, 5], [8, 0, 2, 9, 16], [10, 20, 13, 19, 21], [17, 14, 6, 12, 18, 3]]
        assert group_rows(lengths, 6, 2600) == groups

    @pytest.mark.parametrize("num_groups", [0, 3])
    def test_bad_numbers(self, num_groups):
        with pytest.raises(ValueError, match=f"num_groups={num_groups} must lie between 1 and the number of rows, 2"):
            common_cuts([[1, 2], [3, 4], [5, 6]], num_groups)


@pytest.mark.parametrize(
    ("distributed_type", "zero_stage", "weights", "gradients"),
    [
        ("NO", None, False, False),
        ("MULTI_GPU", None, False, False),
        ("FSDP", None, True, True),
        ("DEEPSPEED", 1, False, False),
        ("DEEPSPEED", 2, False, True),
        ("DEEPSPEED", 3, True, True),
    ],
)
def test_where_processes_wait_for_each_other(distributed_type, zero_stage, weights, gradients):
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(distributed_type), state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    assert weights_are_in_pieces(accelerator) == weights
    assert gradients_are_in_pieces(accelerator) == gradients


class TestRightAligned:
    @settings(deadline=None, max_examples=100)
    @given(rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), known=st.booleans())
    def test_every_token_moves_and_comes_back(self, rows, known):
        prompts, responses = max(p for p, _ in rows) + 1, max(r for _, r in rows) + 1
        mask = torch.zeros(len(rows), prompts + responses, dtype=torch.long)
        for row, (prompt, response) in enumerate(rows):
            mask[row, prompts - prompt : prompts + response] = 1
        ids = torch.arange(1, mask.numel() + 1).view_as(mask)
        longest = max(max(sum(row) for row in rows), 1)

        aligned = RightAligned.of(mask, longest if known else None)
        moved, moved_mask = aligned.move(ids), aligned.move(mask)
        assert moved.shape == (len(rows), aligned.width) and aligned.width == longest
        for row, (prompt, response) in enumerate(rows):
            length = prompt + response
            assert moved_mask[row].tolist() == [0] * (longest - length) + [1] * length
            assert moved[row, longest - length :].tolist() == ids[row][mask[row] == 1].tolist()
        assert torch.equal(aligned.restore(moved) * mask, ids * mask)
        rounded = RightAligned.of(mask, longest if known else None, multiple=4)
        assert rounded.width == min(-(-longest // 4) * 4, mask.size(1))
        assert torch.equal(rounded.restore(rounded.move(ids)) * mask, ids * mask)
        # Of the columns but the last, as next-token outputs are.
        in_front = torch.where(mask[:, 1:] * mask[:, :-1] == 1, ids[:, :-1], 0)
        assert torch.equal(aligned.restore(moved[:, :-1])[:, :-1] * mask[:, 1:] * mask[:, :-1], in_front)


def test_images_go_with_their_rows():
    batch = {
        "prompt_ids": torch.arange(4)[:, None],
        "num_images": [1, 0, 2, 1],
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 1], [1, 2, 2], [1, 1, 3]]),
        "pixel_values": torch.arange(10.0)[:, None],
        "num_items_in_batch": torch.tensor(7),
        "nothing": None,
    }
    taken = take_rows(merge_rows([batch, batch]), [6, 1, 3])
    assert taken["prompt_ids"].flatten().tolist() == [2, 1, 3] and taken["num_images"] == [2, 0, 1]
    assert taken["image_grid_thw"].tolist() == [[1, 1, 1], [1, 2, 2], [1, 1, 3]]
    assert taken["pixel_values"].flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert taken["num_items_in_batch"] == 7 and taken["nothing"] is None


TRL_LOSS = {
    "critic": "none",
    "advantage_estimator": "group",
    "beta": 0.0,
    "importance_sampling_level": "token",
    "num_generations": 4,
}


def trained(family, folder, avoid_padding: bool, **overrides):
    """Two optimizer steps of SGD on responses of very different lengths."""
    recorder, widths, losses = Recorder(), [], []
    set_seed(0)  # weights of value heads
    trainer = sapo_trainer(
        family,
        folder,
        avoid_padding=avoid_padding,
        optim="sgd",
        num_mini_batches=2,
        max_completion_length=24,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        trainer_kwargs={
            "rollout_func": fixed_rollout(random_completions(3, 1, 24)),
            "callbacks": [recorder],
            **overrides.pop("trainer_kwargs", {}),
        },
        **overrides,
    )
    backbone = trainer.accelerator.unwrap_model(trainer.model).base_model
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    if trainer.model.dtype == torch.float64 and trainer.critic is not None:
        trainer.critic.value_head.double()
    policy_loss = trainer.policy_loss

    def recorded_loss(*args):
        loss = policy_loss(*args)
        losses.append(loss.item())
        return loss

    trainer.policy_loss = recorded_loss
    trainer.train()
    trainer.step_losses = [sum(losses[step : step + 2]) for step in range(0, len(losses), 2)]
    return trainer, recorder.rollouts[0], widths


def with_images_in_one(variants: list[dict], fast: dict):
    """Each variant with text; with images one is fast, since rows are moved before any loss or critic sees them."""
    cases = [("qwen2", variant) for variant in variants]
    cases += [pytest.param("qwen2_5_vl", v, marks=() if v is fast else pytest.mark.slow) for v in variants]
    return pytest.mark.parametrize(
        ("family", "overrides"),
        cases,
        indirect=["family"],
        ids=lambda value: value if isinstance(value, str) else value.get("loss_type", value["critic"]),
    )


PADDED = [
    {"critic": "separate"},
    {"critic": "ladder", "critic_reads": 3},
    {
        "critic": "shared",
        "loss_aggregation": "seq-mean-token-mean",
        "beta": 0.1,
        "kl_placement": "loss",
        "kl_estimator": "k3",
    },
    {"critic": "none", "advantage_estimator": "batch", "loss_aggregation": "seq-mean-token-sum-norm"},
    {**TRL_LOSS, "loss_type": "grpo"},
    # Of these TRL takes means and quantiles over the tokens of a micro-batch.
    {**TRL_LOSS, "loss_type": "bnpo"},
    {**TRL_LOSS, "loss_type": "dapo", "entropy_coef": 0.1},
    {**TRL_LOSS, "loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
]


@with_images_in_one(PADDED, fast=PADDED[2])
def test_training_is_what_it_is_with_all_the_padding(family, overrides, tmp_path):
    padded, padded_rollout, padded_shapes = trained(family, tmp_path / "padded", False, **overrides)
    moved, rollout, shapes = trained(family, tmp_path / "moved", True, **overrides)
    for name in ("logps", "entropies", "values", "advantages", "returns"):
        expected, found = getattr(padded_rollout, name), getattr(rollout, name)
        if expected is not None and expected.dim() == 2:
            mask = padded_rollout.segments.mask
            torch.testing.assert_close(
                found[mask], expected[mask], atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    pairs = [(padded.model, moved.model)]
    if padded.critic is not None and padded.args.critic == "separate":
        pairs.append((padded.critic.module, moved.critic.module))
    for expected, found in pairs:
        after = dict(found.named_parameters())
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(after[name], parameter, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    computed, computed_before = (sum(rows * width for rows, width in s) for s in (shapes, padded_shapes))
    assert len(shapes) == len(padded_shapes) and computed < 0.9 * computed_before


@TEXT_FAMILY
def test_widths_are_multiples_where_that_is_asked_for(family, tmp_path):
    _, _, shapes = trained(family, tmp_path, True, pad_to_multiple_of=8, critic="none", advantage_estimator="batch")
    assert len({width for _, width in shapes}) > 1 and all(width % 8 == 0 for _, width in shapes)


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_responses_with_images_of_tools_are_not_cut_off_from_them(family, masked, tmp_path):
    def look_closer(part: str) -> str:
        """
        Look closer.

        Args:
            part: of the image.
        """
        return part

    # TRL writes into the tokenizer how to read calls of tools.
    processing_class = copy.deepcopy(family.processing_class)
    trainer = sapo_trainer(
        family,
        tmp_path,
        mask_truncated_completions=masked,
        trainer_kwargs={"tools": [look_closer], "processing_class": processing_class},
    )
    assert trainer.can_move_rows != masked


IN_FLOAT64 = [
    {"critic": "separate"},
    {"critic": "ladder"},
    {"critic": "shared", "beta": 0.1, "kl_placement": "loss", "kl_estimator": "k3"},
    {**TRL_LOSS, "loss_type": "grpo"},
]


@with_images_in_one(IN_FLOAT64, fast=IN_FLOAT64[0])
def test_training_in_float64_sees_no_difference(family, overrides, tmp_path):
    """Losses and gradients: SGD's weights are nothing else."""
    trainers = []
    for avoid_padding in (False, True):
        model = make_exact(family.build_model())
        start = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with exact_lm_head():
            trainer, rollout, _ = trained(
                family, tmp_path / str(avoid_padding), avoid_padding, model=model, **overrides
            )
        trainers.append((trainer, rollout))
    (padded, padded_rollout), (moved, rollout) = trainers
    assert rollout.logps.dtype == torch.float64
    mask = rollout.segments.mask
    for name in ("logps", "values", "advantages"):
        found, expected = getattr(rollout, name)[mask], getattr(padded_rollout, name)[mask]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert len(moved.step_losses) == 2 and moved.step_losses == pytest.approx(padded.step_losses, abs=1e-9)
    pairs = [(padded.model, moved.model)]
    if overrides["critic"] == "separate":
        pairs.append((padded.critic.module, moved.critic.module))
    for expected, found in pairs:
        after = dict(found.named_parameters())
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(after[name], parameter, atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert max((parameter - start[name]).abs().max() for name, parameter in moved.model.named_parameters()) > 1e-4


@TEXT_FAMILY
def test_models_with_absolute_positions_keep_their_rows(family, tmp_path):
    config = GPT2Config(
        vocab_size=len(family.tokenizer),
        n_positions=128,
        n_embd=32,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    outcomes = []
    for avoid_padding in (False, True):
        set_seed(0)
        trainer, _, shapes = trained(
            family,
            tmp_path / str(avoid_padding),
            avoid_padding,
            model=GPT2LMHeadModel(config),
            critic="none",
            advantage_estimator="batch",
        )
        assert not trainer.can_move_rows and len({width for _, width in shapes}) == 1
        outcomes.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(*outcomes, atol=1e-6, rtol=0)


@TEXT_FAMILY
def test_in_half_precision_log_probabilities_do_not_depend_on_the_rows_beside_them(family, tmp_path):
    """The ratio of the policy to itself is 1, whichever rows it was scored with and is trained with."""
    trainer = sapo_trainer(family, tmp_path, model=family.build_model().bfloat16(), beta=0.0)
    generator = torch.Generator().manual_seed(0)
    lengths = [(11, 24), (3, 2), (7, 5), (16, 9), (2, 17), (5, 5)]
    longest_prompt, longest_response = (max(each) for each in zip(*lengths, strict=True))
    batch = {
        "prompt_ids": torch.randint(20, 200, (len(lengths), longest_prompt), generator=generator),
        "completion_ids": torch.randint(20, 200, (len(lengths), longest_response), generator=generator),
        "prompt_mask": torch.stack([torch.arange(longest_prompt) >= longest_prompt - p for p, _ in lengths]).long(),
        "completion_mask": torch.stack([torch.arange(longest_response) < r for _, r in lengths]).long(),
    }
    with torch.no_grad():
        together = trainer.policy_forward(trainer.model, batch).logps
        alone = trainer.policy_forward(trainer.model, batch, batch_size=1).logps
    difference = (together - alone)[batch["completion_mask"].bool()].abs()
    assert difference.mean() < 5e-4


@pytest.mark.parametrize(
    ("config", "movable"),
    [
        (Qwen2Config(), True),
        (Gemma3TextConfig(), True),  # with parameters by type of layer
        (Qwen2Config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), True),
        (Qwen2Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), False),
        (
            Phi3Config(
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 48,
                    "long_factor": [4.0] * 48,
                }
            ),
            False,
        ),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 8.0},
                }
            ),
            False,
        ),
        (Ministral3Config(), False),
        (Llama4TextConfig(), False),
        (Llama4TextConfig(attn_temperature_tuning=False), True),
        (GPT2Config(), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_which_models_rows_can_move(config, movable):
    assert can_move_rows(config) == movable


def test_a_model_whose_rotation_depends_on_the_batch_is_what_moving_would_change():
    """Why Phi3's is refused: a row beside a long one gives other hidden states than alone."""
    set_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [8.0] * 4,
        },
    )
    model = Phi3Model(config).eval()
    ids = torch.arange(1, 13)[None]
    mask = torch.tensor([[0] * 6 + [1] * 6])
    aligned = RightAligned.of(mask)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(12)[None]).last_hidden_state
        moved = model(
            input_ids=aligned.move(ids), attention_mask=aligned.move(mask), position_ids=torch.arange(6)[None]
        ).last_hidden_state
    assert (padded[:, 6:] - moved).abs().max() > 1e-3 and not can_move_rows(config)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@TEXT_FAMILY
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_logits_of_a_whole_batch_are_never_there(family, critic, tmp_path, monkeypatch):
    """Neither when a rollout is scored nor in an update: TRL's head makes a tile of them after the other."""
    largest = {}
    # The vocabulary is smaller than TRL's tiles: with one tile, the logits are there, and the watch sees them.
    for tile in (32, 32768):
        monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tile)
        with LargestTensor() as watch:
            _, _, shapes = trained(family, tmp_path / str(tile), True, critic=critic)
        largest[tile] = watch.elements
    rows, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    logits = rows * (width - 1) * len(family.tokenizer)
    assert largest[32] < logits <= largest[32768]
