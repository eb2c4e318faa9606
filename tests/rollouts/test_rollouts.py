"""Monte-Carlo rollouts and trees: against exact values, slow references, and a generator whose every call is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sapo_trl.rollouts import ContinuationSampler, Edge, EdgeReplay, RolloutTree, TokenizedPrompts, grow_tree
from sapo_trl.rollouts.portable import from_portable, to_portable
from sapo_trl.rollouts.replay import StoredEdge
from sapo_trl.rollouts.tree import trainable_edges
from tests.testing_utils import FAMILIES, Recorder, sapo_trainer


END = 0


class Counter:
    """
    A generator without chance: it counts on from the last token until 9 and ends there. It keeps the calls made.
    """

    def __init__(self):
        self.calls: list[tuple[list[list[int]], int]] = []

    def generate(self, prompts: TokenizedPrompts, max_new_tokens: int) -> list[list[int]]:
        self.calls.append((prompts.ids, max_new_tokens))
        return [[*range(ids[-1] + 1, 10), END][:max_new_tokens] for ids in prompts.ids]


def score(rows: list[int], completions: list[list[int]], starts: list[int]) -> torch.Tensor:
    """Two reward functions: the prompt's number, and the length."""
    return torch.tensor(
        [[float(row), float(len(completion))] for row, completion in zip(rows, completions, strict=True)]
    )


def sampler(counter: Counter, prompts: list[list[int]], **settings) -> ContinuationSampler:
    arguments = {
        "prompts": TokenizedPrompts(prompts),
        "groups": range(len(prompts)),
        "generate": counter.generate,
        "score": score,
        "weigh": lambda rewards: rewards @ torch.tensor([10.0, 1.0]),
        "end_token_ids": frozenset([END]),
        "max_completion_length": 8,
        "rows_per_call": 100,
    }
    return ContinuationSampler(**{**arguments, **settings})


class TestContinuations:
    def test_exact_prefixes_are_continued_within_their_limits(self):
        counter = Counter()
        result = sampler(counter, [[1, 2], [5]]).sample([0, 1, 0], [[3], [], [3, 4, 5]], limits=[2, 6, 1])
        assert result == [[4, 5], [6, 7, 8, 9, END], [6]]
        ((ids, limit),) = counter.calls
        assert sorted(ids) == sorted([[1, 2, 3], [5], [1, 2, 3, 4, 5]]) and limit == 6

    @given(
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=12),
        st.integers(1, 5),
    )
    def test_cutting_into_calls_changes_nothing(self, requests, rows_per_call):
        rows, lengths, limits = (list(column) for column in zip(*requests, strict=True))
        prompts = [[1, 2], [5]]
        prefixes = [
            list(range(prompts[row][-1] + 1, prompts[row][-1] + 1 + n)) for row, n in zip(rows, lengths, strict=True)
        ]
        counter = Counter()
        result = sampler(counter, prompts, rows_per_call=rows_per_call).sample(rows, prefixes, limits)
        assert result == sampler(Counter(), prompts).sample(rows, prefixes, limits)
        assert len(counter.calls) == math.ceil(len(requests) / rows_per_call)
        # Sorted: what a call decodes beyond a request's own limit is little.
        called = [limit for _, limit in counter.calls]
        assert called == sorted(called, reverse=True)

    def test_equal_states_are_continued_once(self):
        counter = Counter()
        states = sampler(counter, [[1], [1], [7]], groups=[0, 0, 1])
        result = states.values([0, 1, 2, 0, 1], [[], [], [], [2], [3]], num_continuations=2)
        # The prompt's state of rows 0 and 1 is one; the others differ.
        assert result.num_states == 4 and len(counter.calls[0][0]) == 8
        assert result.num_tokens == 2 * (8 + 3 + 7 + 7)
        # 10 * row + length of the whole completion
        assert result.values.tolist() == [8.0, 8.0, 20.0 + 3, 8.0, 10.0 + 8]
        assert result.rewards.shape == (5, 2)

    def test_truncated_continuations_can_be_worth_something_else(self):
        result = sampler(Counter(), [[1], [7]]).values([0, 1], [[], []], 3, truncated_reward=-5.0)
        # Eight tokens do not take row 0 from 1 to the end.
        assert result.values.tolist() == [-5.0, 13.0]

    def test_no_states(self):
        result = sampler(Counter(), [[1]]).values([], [], 3)
        assert result.values.shape == (0,) and result.num_tokens == 0

    def test_unscored_continuations_do_not_count(self):
        rewards = iter([[1.0], [torch.nan], [torch.nan], [torch.nan]])
        states = sampler(
            Counter(),
            [[1], [2]],
            score=lambda rows, completions, starts: torch.tensor([next(rewards) for _ in rows]),
            weigh=lambda rewards: rewards.squeeze(1),
        )
        values = states.values([0, 1], [[], []], 2).values
        assert values[0] == 1.0 and values[1].isnan()

    def test_every_process_calls_equally_often(self):
        """One of two processes has nothing to continue: it goes along, and its rewards are dropped."""
        counter, scored = Counter(), []

        def count(rows, completions, starts):
            scored.append(len(rows))
            return score(rows, completions, starts)

        # What the other process has: 5 states of 2 continuations, of up to 10 tokens.
        states = sampler(counter, [[1]], score=count, rows_per_call=4, max_over_processes=lambda own: max(own, 10))
        assert states.values([], [], 2).values.shape == (0,)
        assert scored == [4, 4, 2]
        assert [(len(ids), limit) for ids, limit in counter.calls] == [(4, 10), (4, 10), (2, 10)]


class TestPrompts:
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
    def test_rows_and_images_stay_together(self, family, tmp_path):
        """Log-probabilities of rows taken in any order are those of each row alone."""
        trainer = sapo_trainer(family, tmp_path)
        rows = list(trainer.train_dataset.select(range(4)))
        prompts = trainer.tokenized_prompts(rows)
        completions = [[30, 31, 32], [40], [50, 51], [60, 61, 62, 63]]
        order = [2, 0, 2, 3]
        pad, device = trainer.tokenizer.pad_token_id, trainer.accelerator.device
        batch = prompts.model_inputs(order, [completions[row] for row in order], pad, device)
        with torch.no_grad():
            together = trainer.policy_forward(trainer.model, batch).logps
            for position, row in enumerate(order):
                single = trainer.tokenized_prompts([rows[row]]).model_inputs([0], [completions[row]], pad, device)
                alone = trainer.policy_forward(trainer.model, single).logps[0]
                torch.testing.assert_close(together[position, : len(alone)], alone, rtol=0, atol=1e-5)

    def test_what_cannot_be_split_is_an_error(self):
        prompts = TokenizedPrompts([[1], [2]], None, {"mystery": torch.zeros(3, 2)})
        with pytest.raises(ValueError, match=r"'mystery' of shape \(3, 2\) has neither one row for each of the 2"):
            prompts.extended([0], [[]])


def slow_value(tree: RolloutTree, rewards: dict[int, float], node: int) -> float:
    children = [child for child, parent in enumerate(tree.parents) if parent == node]
    return sum(slow_value(tree, rewards, c) for c in children) / len(children) if children else rewards[node]


class TestTree:
    @settings(max_examples=50)
    @given(st.lists(st.integers(0, 10), max_size=25), st.integers(1, 3), st.integers(0, 10**6))
    def test_values_equal_the_recursion(self, picks, num_roots, seed):
        tree = RolloutTree()
        for row in range(num_roots):
            tree.add(row, -1, [], False)
        for pick in picks:
            parent = pick % len(tree)
            tree.add(tree.rows[parent], parent, [pick], False)
        rewards = torch.rand(len(tree.leaves), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        by_leaf = dict(zip(tree.leaves, rewards.tolist(), strict=True))
        expected = [slow_value(tree, by_leaf, node) for node in range(len(tree))]
        torch.testing.assert_close(
            tree.values(rewards), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )
        both = tree.values(torch.stack([rewards, 2 * rewards], dim=1))
        torch.testing.assert_close(both[:, 1], 2 * both[:, 0], rtol=0, atol=1e-12)

    def test_published_example(self):
        """Two levels of two: leaves (1, 0) and (1, 1)."""
        tree = RolloutTree()
        root = tree.add(0, -1, [], False)
        inner = [tree.add(0, root, [token], False) for token in (1, 2)]
        for node, token in itertools.product(inner, (3, 4)):
            tree.add(0, node, [token], True)
        values = tree.values(torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64))
        assert values.tolist() == [0.75, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0]
        edges = trainable_edges(tree, values)
        # The second inner node's leaves are worth what it is: dropped.
        assert [(edge.completion, edge.start, edge.child_value - edge.parent_value) for edge in edges] == [
            ([1], 0, -0.25),
            ([2], 0, 0.25),
            ([1, 3], 1, 0.5),
            ([1, 4], 1, -0.5),
        ]

    def test_unscored_leaves_count_for_nothing(self):
        tree = RolloutTree()
        tree.add(0, -1, [], False)
        tree.add(1, -1, [], False)
        for parent in (0, 0, 1):
            tree.add(parent, parent, [5], True)
        values = tree.values(torch.tensor([1.0, torch.nan, torch.nan], dtype=torch.float64))
        assert values[0] == 1.0 and values[1].isnan()
        assert trainable_edges(tree, values) == []

    def test_growth(self):
        """Below 1 the count goes on to 9: early ends are leaves, the last level runs to the end."""
        counter = Counter()
        tree = grow_tree(sampler(counter, [[1], [7]], max_completion_length=20), [0, 1], [2, 3, 1], segment_length=3)
        depths = torch.tensor(tree.depths)
        rows = torch.tensor(tree.rows)
        # Row 0: 2 + 6 + 6 nodes below the root; row 1 ends within its first three tokens.
        assert [int(((depths == d) & (rows == 0)).sum()) for d in range(4)] == [1, 2, 6, 6]
        assert [int(((depths == d) & (rows == 1)).sum()) for d in range(4)] == [1, 2, 0, 0]
        assert {tuple(tree.prefix(leaf)) for leaf in tree.leaves} == {(2, 3, 4, 5, 6, 7, 8, 9, END), (8, 9, END)}
        assert [limit for _, limit in counter.calls] == [3, 3, 14]

    def test_no_response_grows_beyond_its_length(self):
        tree = grow_tree(sampler(Counter(), [[1]], max_completion_length=5), [0], [1, 1, 1], segment_length=3)
        assert [len(tokens) for tokens in tree.tokens] == [0, 3, 2] and tree.leaves == [2]


def stored(prompt: int, index: int) -> StoredEdge:
    edge = Edge(prompt, index, [prompt, index], 1, 0.0, 1.0)
    return StoredEdge({"prompt": prompt}, edge, torch.zeros(2), torch.zeros(1))


class TestReplay:
    def test_nothing_is_drawn_twice_nor_after_its_age(self):
        replay = EdgeReplay(max_age=3, edges_per_prompt=4, seed=0)
        drawn, ages = [], []
        for rollout in range(6):
            replay.add([[stored(rollout * 2 + prompt, i) for i in range(10)] for prompt in range(2)])
            edges = replay.draw(8)
            drawn += [(edge.edge.row, edge.edge.node) for edge in edges]
            ages.append([edge.age for edge in edges])
            assert all(sum(edge.edge.row == row for edge in edges) <= 4 for row in range(12))
        assert len(drawn) == len(set(drawn)) == 6 * 8
        assert max(max(row) for row in ages) == 2
        assert all(age == 0 for age in ages[0])

    def test_too_few_are_repeated_and_none_is_none(self):
        replay = EdgeReplay(max_age=1, edges_per_prompt=4, seed=0)
        assert replay.draw(3) == []
        replay.add([[stored(0, 0), stored(0, 1)]])
        drawn = replay.draw(5)
        assert len(drawn) == 5 and len({id(edge) for edge in drawn}) == 2
        assert len(replay) == 0

    def test_seed_decides(self):
        def draws(seed):
            replay = EdgeReplay(2, 4, seed)
            replay.add([[stored(0, i) for i in range(20)]])
            return [edge.edge.node for edge in replay.draw(4)]

        assert draws(1) == draws(1) != draws(2)


class TestPortable:
    def test_rows_come_back(self, tmp_path):
        """Through a file that is read without running anything, images to the last pixel."""
        image = Image.effect_noise((5, 7), 50).convert("RGB")
        row = {
            "prompt": [{"role": "user", "content": "A"}],
            "images": [image, image],
            "numbers": [1, 2.5, None, True],
            "tensor": torch.arange(3),
        }
        torch.save(to_portable(row), tmp_path / "row.pt")
        back = from_portable(torch.load(tmp_path / "row.pt", weights_only=True))
        assert {name: back[name] for name in ("prompt", "numbers")} == {
            name: row[name] for name in ("prompt", "numbers")
        }
        assert torch.equal(back["tensor"], row["tensor"])
        assert all(found.tobytes() == image.tobytes() and found.mode == "RGB" for found in back["images"])

    def test_what_cannot_be_written_is_said(self):
        with pytest.raises(TypeError, match="type object cannot be written to a checkpoint"):
            to_portable({"a": [object()]})


ORDINARY = range(20, 250)
"""Tokens that are plain bytes, not special ones: an image placeholder without its image cannot be read."""


def two_token_reward(completion_ids, **kwargs) -> list[float]:
    """Depends on both tokens of a response, so that every state has another value."""
    return [
        float(all(token in ORDINARY for token in ids) and (sum(ids) * 2654435761 >> 7) % 3 == 0)
        for ids in completion_ids
    ]


def exact_value(trainer, prompts: TokenizedPrompts, row: int, prefix: list[int]) -> float:
    """Sum over all continuations to two tokens: probability times reward."""
    if any(token not in ORDINARY for token in prefix):
        return 0.0  # whatever follows
    pad, device = trainer.tokenizer.pad_token_id, trainer.accelerator.device
    contexts = [prefix] if prefix else [[], *([token] for token in ORDINARY)]
    batch = prompts.model_inputs([row] * len(contexts), contexts, pad, device)
    completion_mask = batch.pop("completion_mask")
    inputs = {
        "input_ids": torch.cat([batch.pop("prompt_ids"), batch.pop("completion_ids")], dim=1),
        "attention_mask": torch.cat([batch.pop("prompt_mask"), completion_mask], dim=1),
    }
    batch.pop("num_images", None)
    with torch.no_grad():
        logits = trainer.model(**inputs, **batch).logits
    # Of each context the distribution behind its last token.
    last = torch.where(completion_mask.any(dim=1), -1, -1 - completion_mask.size(1))
    probabilities = logits[torch.arange(len(contexts)), last].double().softmax(dim=-1)

    def value_of(context: list[int], distribution: torch.Tensor) -> float:
        rewards = two_token_reward([[*context, token] for token in range(distribution.numel())])
        return float(distribution @ torch.tensor(rewards, dtype=torch.float64))

    if prefix:
        return value_of(prefix, probabilities[0])
    # A response that ends with its first token has a special token and no reward.
    return sum(
        float(probabilities[0][token]) * value_of([token], distribution)
        for token, distribution in zip(ORDINARY, probabilities[1:], strict=True)
    )


@pytest.fixture
def known_task(request, tmp_path, tokenizer, qwen2_5_vl_processor):
    """A trainer whose task's values can be summed up: responses of at most two tokens of the whole vocabulary."""
    processing = {"qwen2": tokenizer, "qwen2_5_vl": qwen2_5_vl_processor}[request.param]
    family = FAMILIES[request.param](processing)
    recorder = Recorder()

    def make(**settings):
        return sapo_trainer(
            family,
            tmp_path,
            max_steps=1,
            max_completion_length=2,
            trainer_kwargs={"reward_funcs": two_token_reward, "callbacks": [recorder]},
            **settings,
        )

    return make, recorder


WITH_SLOW_IMAGES = pytest.mark.parametrize(
    "known_task", ["qwen2", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)], indirect=True
)


class TestKnownValues:
    @WITH_SLOW_IMAGES
    def test_sampled_values_agree_with_exact_ones(self, known_task):
        make, _ = known_task
        trainer = make()
        rows = list(trainer.train_dataset.select(range(3)))
        prompts = trainer.tokenized_prompts(rows)
        states = [(0, []), (1, []), (2, [70]), (0, [71])]
        number = 800
        trainer.args.steps_per_generation = 4000  # all in one call
        result = trainer.continuation_sampler(prompts, rows).values(*zip(*states, strict=True), number)
        for (row, prefix), value in zip(states, result.values.tolist(), strict=True):
            exact = exact_value(trainer, prompts, row, prefix)
            assert 0.02 < exact < 0.98
            assert value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / number))

    @WITH_SLOW_IMAGES
    @pytest.mark.slow
    def test_the_trainer_reads_them_at_the_starts_of_segments(self, known_task):
        make, recorder = known_task
        trainer = make(
            critic="monte_carlo",
            segmentation="token",
            num_continuations=400,
            lam=0.0,
            beta=0.0,
            whiten_advantages=False,
            advantage_clamp=None,
            num_mini_batches=1,
            learning_rate=0.0,
        )
        trainer.train()
        (rollout,) = recorder.rollouts
        prompts = rollout.continuations.prompts
        for row, (ids, mask) in enumerate(zip(rollout.completion_ids.tolist(), rollout.segments.mask, strict=True)):
            values = [exact_value(trainer, prompts, row, ids[:t]) for t in range(int(mask.sum()))]
            for t, exact in enumerate(values):
                error = 4 * math.sqrt(exact * (1 - exact) / 400)
                assert rollout.values[row, t].item() == pytest.approx(exact, abs=error)
            # One-step differences, the reward at the end.
            differences = [
                after - before for before, after in itertools.pairwise([*values, rollout.rewards[row].item()])
            ]
            assert rollout.advantages[row][mask].tolist() == pytest.approx(differences, abs=0.2)

    @pytest.mark.parametrize("known_task", ["qwen2"], indirect=True)
    def test_tree(self, known_task):
        make, _ = known_task
        trainer = make()
        rows = list(trainer.train_dataset.select(range(1)))
        prompts = trainer.tokenized_prompts(rows)
        trainer.args.steps_per_generation = 4000
        states = trainer.continuation_sampler(prompts, rows)
        tree = grow_tree(states, [0], [60, 50], segment_length=1)
        leaves = tree.leaves
        rewards = states.weigh(states.scores([0] * len(leaves), [tree.prefix(leaf) for leaf in leaves]))
        values = tree.values(rewards.double())
        exact = exact_value(trainer, prompts, 0, [])
        # 60 independent children.
        children = values[torch.tensor(tree.parents) == 0]
        assert values[0].item() == pytest.approx(exact, abs=4 * children.std().item() / math.sqrt(60))
        node = tree.parents.index(0)
        below = exact_value(trainer, prompts, 0, tree.tokens[node])
        assert values[node].item() == pytest.approx(below, abs=4 * math.sqrt(below * (1 - below) / 50) + 1e-9)
