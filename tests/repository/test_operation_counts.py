"""Operations are counted as by hand, and the benchmarks' rows cost what their critics promise."""

import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sapo_trl import SegmentValueHead
from sapo_trl.critic.ladder import LadderSizes

from .test_benchmarks import BENCHMARKS, load


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return load


def products(*sizes: tuple[int, int, int]) -> int:
    """Operations of matrix products `(n, k) @ (k, m)`."""
    return sum(2 * n * k * m for n, k, m in sizes)


class TestOperationCounter:
    def test_linear_layers(self, script):
        """Forward: a product for each layer. Backward: two for each layer, but the inputs need no gradient."""
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        with script("operations").OperationCounter() as counter:
            output = model(torch.randn(11, 5))
            assert counter.total == products((11, 5, 7), (11, 7, 3))
            output.sum().backward()
        assert counter.total == products((11, 5, 7), (11, 7, 3)) * 2 + products((11, 3, 7))

    @pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
    @pytest.mark.parametrize("key_heads", [4, 2])
    def test_attention(self, script, mask, key_heads):
        """
        Forward: scores and sums of values. Backward: the scores once more, and a product for the gradients of the
        values, the probabilities, the queries and the keys.
        """
        rows, heads, queries, keys, width = 2, 4, 6, 9, 8
        query = torch.randn(rows, heads, queries, width, requires_grad=True)
        key, value = (torch.randn(rows, key_heads, keys, width, requires_grad=True) for _ in range(2))
        allowed = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril()
        masks = {"bool": allowed, "float": torch.zeros(rows, 1, queries, keys).masked_fill(~allowed, -1e9)}
        with script("operations").OperationCounter() as counter:
            output = nn.functional.scaled_dot_product_attention(
                query, key, value, masks.get(mask), is_causal=mask == "causal", enable_gqa=key_heads != heads
            )
            product = rows * heads * products((queries, width, keys))
            assert counter.total == 2 * product
            output.sum().backward()
        assert counter.total == 7 * product


HIDDEN, LAYERS, VOCABULARY, RESPONSE, ROWS = 64, 2, 1024, 24, 4
TINY = f"--size tiny --hidden_size {HIDDEN} --layers {LAYERS} --micro_batch 2 --accumulation 1 --image_size 56"
EQUAL = (*TINY.split(), "--completion_length", str(RESPONSE), "--same_length")
# The longest would be far longer than the others: padding is most of TRL's tokens.
SPREAD = (*TINY.split(), "--completion_length", "1500")


@pytest.fixture
def update_cost(script):
    return script("update_cost")


@pytest.fixture
def count(update_cost):
    """Operations of a row's rollout of four responses, with a tiny model."""

    def count(name: str, *arguments: str) -> int:
        options = update_cost.parser().parse_args(arguments)
        update_cost.complete(options)
        return update_cost.count_operations(name, options)

    return count


class TestRows:
    """Whole rollouts: scoring them and training on them, in two optimizer steps."""

    @pytest.fixture
    def length(self, update_cost):
        """Tokens of each prompt with its response."""
        prompt = update_cost.build_text_dataset(1)[0]["prompt"]
        tokenizer = update_cost.build_processor_for(56).tokenizer
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) + RESPONSE

    @staticmethod
    def by_hand(length: int) -> tuple[int, int]:
        """Forward and backward of a row's transformer, without LM head. Heads have 32 channels."""
        attention = 4 * products((length, HIDDEN, HIDDEN))
        feed_forward = 3 * products((length, HIDDEN, 3 * HIDDEN))
        square = products((length, HIDDEN, length))
        forward = LAYERS * (attention + feed_forward + 2 * square)
        return forward, LAYERS * (2 * (attention + feed_forward) + 5 * square)

    def test_trl_is_counted_as_by_hand(self, count, length):
        forward, backward = self.by_hand(length)
        # Without Triton, TRL's LM head computes the logits of prompts, too. It forgets them, and computes them again
        # for their gradient.
        head = products((length - 1, HIDDEN, VOCABULARY))
        assert count("grpo", *EQUAL, "--text") == ROWS * (2 * (forward + head) + backward + 3 * head)

    @pytest.mark.slow
    def test_critics_are_counted_as_by_hand(self, count, length):
        forward, backward = self.by_hand(length)
        value = products((length, HIDDEN, 1))
        without = count("grpo", *EQUAL, "--text")
        assert count("sapo_none", *EQUAL, "--text") == without
        # The policy's hidden states get no gradient from a shared critic.
        assert count("sapo_shared", *EQUAL, "--text") == without + ROWS * 3 * value
        separate = 2 * (forward + value) + backward + 2 * value
        assert count("sapo_separate", *EQUAL, "--text") == without + ROWS * separate

    @pytest.mark.slow
    @pytest.mark.parametrize("text", [True, False], ids=["text", "images"])
    @pytest.mark.parametrize(
        ("row", "least", "most"),
        [("sapo_none", 1, 1), ("sapo_shared", 1, 1.001), ("sapo_separate", 1.65, 2), ("sapo_adapter", 1.65, 2)],
    )
    def test_ratio_without_padding(self, update_cost, count, row, least, most, text):
        """No critic has an LM head, which TRL's trainer runs for the responses."""
        arguments = (*EQUAL, "--text") if text else EQUAL
        assert least <= count(row, *arguments) / count(update_cost.ROWS[row][3], *arguments) <= most

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("row", "least", "most"),
        [("sapo_none", 0.8, 0.9), ("sapo_shared", 0.8, 0.9), ("sapo_separate", 1.4, 1.7), ("sapo_adapter", 1.4, 1.7)],
    )
    def test_ratio_with_padding(self, update_cost, count, row, least, most):
        """TRL pads to the longest response. Here 1 - 2483 / (4 * 732) = 15 % of its tokens are padding."""
        assert least <= count(row, *SPREAD) / count(update_cost.ROWS[row][3], *SPREAD) <= most

    @pytest.mark.slow
    def test_counts_repeat(self, count):
        assert count("sapo_adapter", *EQUAL) == count("sapo_adapter", *EQUAL)

    def test_checkpointing_counts_the_second_forward(self, count, length):
        """It stops where the backward has everything it needs: before the last product of each layer."""
        forward, _ = self.by_hand(length)
        forward -= LAYERS * products((length, 3 * HIDDEN, HIDDEN))
        without = count("grpo", *EQUAL, "--text")
        assert count("grpo", *EQUAL, "--text", "--gradient_checkpointing") == without + ROWS * forward

    @pytest.mark.slow
    @pytest.mark.parametrize("text", [True, False], ids=["text", "images"])
    @pytest.mark.parametrize("row", ["grpo_lora", "sapo_separate"])
    def test_no_product_is_left_out(self, script, update_cost, count, row, text):
        """The counter takes operations for free that it does not know. No name of them may tell of a product."""
        seen = set()

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func._overloadpacket)
                return func(*args, **(kwargs or {}))

        with Names():
            count(row, *(EQUAL, (*EQUAL, "--text"))[text])
        known = script("operations").OperationCounter().flop_registry
        products = {
            packet for packet in seen if re.search("(?<!cu)mm|mv|dot|matmul|linear|attention|conv", str(packet))
        }
        assert torch.ops.aten.addmm_ in products
        assert sorted(map(str, products - known.keys())) == []


class TestLadder:
    """A ladder's promise: at most a tenth of the operations more than TRL's GRPO."""

    # A quarter of the policy's width, as for large policies. At smaller widths a ladder cannot shrink any more.
    REALISTIC = TINY.replace(f"--hidden_size {HIDDEN} --layers {LAYERS}", "--hidden_size 256 --layers 3").split()

    @pytest.mark.slow
    @pytest.mark.parametrize("row", ["sapo_ladder", "sapo_ladder_lora"])
    def test_rows(self, update_cost, count, row):
        arguments = (*self.REALISTIC, "--completion_length", str(RESPONSE), "--same_length", "--text")
        ratio = count(row, *arguments) / count(update_cost.ROWS[row][3], *arguments)
        assert 1.005 < ratio <= 1.1

    def test_ladder_is_counted_as_by_hand(self, script):
        """Two layers of width 64 and four heads, which read two states. Its inputs need no gradient."""
        scaling = script("operations_scaling")
        critic = SegmentValueHead(256, ladder=LadderSizes.for_policy(256, 8))
        length, width = 40, 64
        reads = 2 * products((length, 256, width))
        layer = products((length, width, 3 * width), (length, width, width), *2 * [(length, width, 2 * width)])
        # Queries, keys and values have eight further columns in each head.
        square = 4 * products((length, width // 4 + 8, length))
        head = products((length, width, 1))
        forward = reads + 2 * (layer + 2 * square) + head
        backward = reads + 2 * (2 * layer + 5 * square) + 2 * head
        assert scaling.reading_operations(critic, 256, length) == 2 * forward + backward


class TestScaling:
    """`operations_scaling.py` counts fake tensors."""

    @pytest.fixture
    def scaling(self, script):
        return script("operations_scaling")

    def test_backbone_is_counted_as_by_hand(self, scaling):
        """Two layers of width 128: four heads of 32 channels, and two of keys and values. They run three times."""
        length, layers, width = 40, 2, 128
        linear = 2 * products((length, width, width)) + 2 * products((length, width, width // 2))
        feed_forward = 3 * products((length, width, 3 * width))
        square = products((length, width, length))
        forward = layers * (linear + feed_forward + 2 * square)
        backward = layers * (2 * (linear + feed_forward) + 5 * square)
        again = forward - layers * products((length, 3 * width, width))
        with scaling.FakeTensorMode():
            policy = scaling.build_policy("embedded", False, layers)
            assert scaling.backbone_operations(policy, length) == 2 * forward + backward + again

    @pytest.mark.slow
    def test_table(self, scaling):
        (found,) = scaling.ratios("embedded", 1, 16, (8,))
        assert 1 < found["shared"] < found["ladder"] < found["separate"] < 2
        assert 1 < found["shared, LoRA"] < found["ladder, LoRA"] < found["adapter, LoRA"] < 2
        options = {"layers": [1], "lengths": [8], "prompt": 16}
        printed = scaling.as_markdown({"options": options, "depth": [found], "length": {"embedded": [found]}})
        assert printed.count(f"| ladder | {found['ladder']:.4f} |") == 2
