"""The ladder: a small transformer that reads a policy's hidden states, against a slow reference."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from sapo_trl import SegmentValueHead
from sapo_trl.critic.ladder import LadderSizes
from sapo_trl.critic.policy_states import read_depths
from sapo_trl.planner.shapes import PUBLISHED, model_shape


HIDDEN = 24

TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def build(layers: int = 2, width: int = 64, reads: int = 2, dtype=torch.float64) -> SegmentValueHead:
    torch.manual_seed(0)
    critic = SegmentValueHead(HIDDEN, ladder=LadderSizes(layers, width, reads))
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if "norm" in name:  # first all ones, which hides whether they act
                parameter.uniform_(0.5, 1.5)
        critic.head.bias.fill_(0.3)
        for block in critic.ladder.blocks:
            block.log_slope_bias += torch.rand(len(block.log_slope_bias)) - 0.5
    return critic.to(dtype)


def states(rows: int, length: int, reads: int = 2, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Of unlike scales, as the embeddings and the last state of a policy are.
    return [3.0**r * torch.randn(rows, length, HIDDEN, generator=generator, dtype=dtype) for r in range(reads)]


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / math.sqrt(sum(float(number) ** 2 for number in x) / len(x) + 1e-6)


def slow_row(critic: SegmentValueHead, row: list[torch.Tensor]) -> torch.Tensor:
    """Values of one row without padding, `(S,)`: softmax attention with its bias, query by query and head by head."""
    ladder, length = critic.ladder, len(row[0])
    x = torch.zeros(length, ladder.sizes.width, dtype=torch.float64)
    for place, block in enumerate(ladder.blocks):
        for index, state in enumerate(row):
            if index * len(ladder.blocks) // len(row) == place:
                for t in range(length):
                    x[t] = x[t] + ladder.projections[index].weight @ rms_norm(state[t])
        normed = torch.stack([rms_norm(x[t]) * block.attention_norm.weight for t in range(length)])
        q, k, v = (normed @ block.queries_keys_values.weight.T).chunk(3, dim=1)
        heads = len(block.log_slope_bias)
        width = ladder.sizes.width // heads
        mixed = torch.zeros_like(x)
        for head in range(heads):
            columns, slope = slice(head * width, (head + 1) * width), math.exp(block.log_slope_bias[head])
            for t in range(length):
                scores = torch.stack([
                    q[t, columns] @ k[s, columns] / math.sqrt(width) - slope * (t - s) for s in range(t + 1)
                ])  # fmt: skip
                weights = scores.exp() / scores.exp().sum()
                mixed[t, columns] = sum(weights[s] * v[s, columns] for s in range(t + 1))
        x = x + mixed @ block.attention_output.weight.T
        for t in range(length):
            inner = block.up.weight @ (rms_norm(x[t]) * block.feed_forward_norm.weight)
            x[t] = x[t] + block.down.weight @ (inner / (1 + (-inner).exp()))
    output = torch.stack([rms_norm(x[t]) * ladder.output_norm.weight for t in range(length)])
    return output @ critic.head.weight[0] + critic.head.bias


class TestValues:
    @pytest.mark.parametrize(("layers", "width", "reads"), [(2, 64, 2), (1, 64, 3), (3, 128, 2), (2, 320, 1)])
    @torch.no_grad()
    def test_slow_reference(self, layers, width, reads):
        critic, read = build(layers, width, reads), states(2, 7, reads)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]])
        values = critic(hidden_states=read, attention_mask=mask)
        for row in range(2):
            kept = mask[row].bool()
            expected = slow_row(critic, [state[row, kept] for state in read])
            torch.testing.assert_close(values[row, kept], expected, rtol=0, atol=1e-9)
        assert values.isfinite().all()

    @hypothesis_settings(max_examples=30, deadline=None)
    @given(mask=st.lists(st.booleans(), min_size=2, max_size=12), seed=st.integers(0, 99))
    @torch.no_grad()
    def test_padding_changes_no_value(self, mask, seed):
        """On the left, on the right and between tokens: distance counts tokens, not columns."""
        if not any(mask):
            return
        critic, kept = build(), torch.tensor(mask)
        alone = states(1, sum(mask), seed=seed)
        padded = states(1, len(mask), seed=seed + 1)
        for of_row, short in zip(padded, alone, strict=True):
            of_row[0, kept] = short[0]
        expected = critic(hidden_states=alone)
        values = critic(hidden_states=padded, attention_mask=kept[None].long())
        torch.testing.assert_close(values[0, kept], expected[0], rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_distance_matters_and_the_future_does_not(self):
        critic, read = build(), states(1, 6)
        values = critic(hidden_states=read)
        changed = copy.deepcopy(read)
        for state in changed:
            state[0, 4] += 1
        after = critic(hidden_states=changed)
        assert torch.equal(values[0, :4], after[0, :4]) and (values[0, 4:] != after[0, 4:]).all()
        for block in critic.ladder.blocks:
            block.log_slope_bias += 1
        assert (critic(hidden_states=read)[0, 1:] - values[0, 1:]).abs().min() > 1e-5

    def test_no_gradient_reaches_what_is_read(self):
        critic, read = build(), [state.requires_grad_() for state in states(1, 5)]
        critic(hidden_states=read).sum().backward()
        assert [state.grad for state in read] == [None] * critic.reads and critic.reads > 1
        assert all(parameter.grad.abs().max() > 0 for parameter in critic.parameters())

    def test_slopes_gradient_is_that_of_the_distance(self):
        """By finite differences: the columns that carry the distance carry its gradient."""
        critic, read = build(), states(1, 9)
        slopes = critic.ladder.blocks[0].log_slope_bias
        critic(hidden_states=read)[0, -1].backward()
        with torch.no_grad():
            for head in range(len(slopes)):
                ends = []
                for step in (1e-5, -2e-5):
                    slopes[head] += step
                    ends.append(critic(hidden_states=read)[0, -1])
                slopes[head] += 1e-5
                assert float(slopes.grad[head]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-9)

    def test_half_precision_keeps_float32_values_and_whole_distances(self):
        """Under autocast, and on half-precision states without it; also far behind the 256 that bfloat16 counts to."""
        critic, read = build(dtype=torch.float32), states(1, 700, dtype=torch.float32)
        assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
        sums = []
        for module in (*critic.ladder.blocks, critic.ladder.output_norm):
            module.register_forward_pre_hook(lambda _module, args: sums.append(args[0].dtype))
        with torch.no_grad():
            exact = critic(hidden_states=read)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under_autocast = critic(hidden_states=read)
            on_half = critic(hidden_states=[state.bfloat16() for state in read])
        assert sums == 9 * [torch.float32]
        for values in (under_autocast, on_half):
            assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
            # Rounding alone. It is no larger at the end, where positions are large numbers.
            assert (values - exact).abs().max() < 0.02 < exact.std()
            assert (values - exact)[0, 512:].std() < 1.5 * (values - exact)[0, :256].std()

    def test_half_precision_keeps_the_slopes_gradient_of_long_rows(self):
        """Rounding must not multiply the gradient's error by a position, of thousands, instead of a distance."""
        gradients, target = {}, torch.randn(1, 2000, generator=torch.Generator().manual_seed(1))
        for kind, dtype in (("exact", torch.float64), ("autocast", torch.float32), ("half", torch.bfloat16)):
            critic = build(dtype=torch.float64 if kind == "exact" else torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
                values = critic(hidden_states=[state.to(dtype) for state in states(1, 2000)])
            (values - target).square().mean().backward()
            gradients[kind] = torch.stack([block.log_slope_bias.grad.double() for block in critic.ladder.blocks])
        for kind in ("autocast", "half"):
            error = (gradients[kind] - gradients["exact"]).norm(dim=1) / gradients["exact"].norm(dim=1)
            assert error.max() < 0.1, kind

    def test_gradient_checkpointing_changes_nothing(self):
        results = []
        for checkpoints in (False, True):
            critic, read = build(dtype=torch.float32), states(2, 6, dtype=torch.float32)
            critic.ladder.checkpoints = checkpoints
            runs = []
            critic.ladder.blocks[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
            values = critic(hidden_states=read, attention_mask=torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]))
            values.square().sum().backward()
            results.append((values, len(runs), {n: p.grad for n, p in critic.named_parameters()}))
        (values, once, gradients), (again, twice, again_gradients) = results
        assert (once, twice) == (1, 2) and torch.equal(values, again)
        assert all(torch.equal(gradient, again_gradients[name]) for name, gradient in gradients.items())

    def test_states_that_are_missing(self):
        critic = build()
        with pytest.raises(ValueError, match="'ladder' critic has no backbone: pass 2 of .*got 0"):
            critic(input_ids=torch.tensor([[1]]))
        with pytest.raises(ValueError, match="pass 2 of the policy's `hidden_states`, got 1"):
            critic(hidden_states=states(1, 3)[0])


@TEXT_FAMILY
def test_learns_what_a_linear_layer_on_one_state_cannot(family):
    """Whether one of two tokens was read anywhere before, of a random policy whose last state forgets it."""
    policy, explained = family.build_model().eval(), {}

    def batch(rows: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        ids = torch.randint(20, 40, (rows, 12), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            hidden = policy(input_ids=ids, output_hidden_states=True).hidden_states
        return hidden, ((ids == 33) | (ids == 31)).cumsum(1).clamp(max=1).float()

    for mode, rate in (("shared", 1e-2), ("ladder", 3e-3)):
        torch.manual_seed(0)
        critic = SegmentValueHead.from_policy(policy, mode)
        optimizer = torch.optim.Adam(critic.parameters(), lr=rate)
        for step in range(101):
            hidden, target = batch(16 if step < 100 else 256, step)
            values = critic(hidden_states=[hidden[depth] for depth in critic.depths(policy)])
            optimizer.zero_grad()
            (values - target).square().mean().backward()
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
        explained[mode] = float(1 - (target - values).var() / target.var())
    assert explained["ladder"] > 0.9 and explained["shared"] < 0.4, explained


class TestSharedReads:
    @torch.no_grad()
    def test_several_are_normalised_and_concatenated(self):
        torch.manual_seed(0)
        critic = SegmentValueHead(HIDDEN, reads=3).double()
        critic.head.bias.fill_(0.3)
        assert critic.mode == "shared" and critic.reads == 3 and critic.head.in_features == 3 * HIDDEN
        read = states(1, 4, reads=3)
        values = critic(hidden_states=read)
        for t in range(4):
            expected = torch.cat([rms_norm(state[0, t]) for state in read]) @ critic.head.weight[0] + 0.3
            assert float(values[0, t]) == pytest.approx(float(expected), abs=1e-9)

    @torch.no_grad()
    def test_one_is_read_as_it_is(self):
        torch.manual_seed(0)
        critic, (state,) = SegmentValueHead(HIDDEN), states(2, 3, reads=1, dtype=torch.float32)
        expected = nn.functional.linear(state, critic.head.weight, critic.head.bias)[..., 0]
        assert torch.equal(critic(hidden_states=state), expected)


class TestSizes:
    def test_depths_are_evenly_spread(self):
        assert read_depths(1, 36) == [36]
        assert read_depths(2, 36) == [0, 36]
        assert read_depths(4, 36) == [0, 12, 24, 36]
        assert read_depths(4, 28) == [0, 9, 19, 28]
        assert read_depths(3, 2) == [0, 1, 2]
        with pytest.raises(ValueError, match="`critic_reads` is 4, but a policy of 2 layers has 3.*at most 3"):
            read_depths(4, 2)

    @given(layers=st.integers(1, 80), reads=st.integers(1, 81))
    def test_depths_are_distinct_and_end_at_the_last(self, layers, reads):
        if reads > layers + 1:
            return
        depths = read_depths(reads, layers)
        assert len(depths) == reads and depths[-1] == layers and depths == sorted(set(depths))
        gaps = {after - before for before, after in zip(depths[:-1], depths[1:], strict=True)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert reads == 1 or depths[0] == 0

    @pytest.mark.parametrize("model", [name for name in PUBLISHED if name != "embedded"])
    def test_default_is_half_a_percent_of_a_policy(self, model):
        shape = model_shape(model)
        sizes = LadderSizes.for_policy(shape.hidden, shape.layers)
        assert 0.002 < sizes.parameters(shape.hidden) / shape.parameters < 0.01

    @pytest.mark.parametrize(("layers", "width", "reads"), [(2, 64, 2), (3, 320, 4)])
    def test_count_of_parameters(self, layers, width, reads):
        critic = build(layers, width, reads)
        counted = sum(parameter.numel() for parameter in critic.ladder.parameters())
        assert LadderSizes(layers, width, reads).parameters(HIDDEN) == counted

    def test_given_sizes_are_kept(self):
        assert LadderSizes.for_policy(2048, 36) == LadderSizes(4, 512, 4)
        assert LadderSizes.for_policy(2048, 36, layers=6) == LadderSizes(6, 512, 6)
        assert LadderSizes.for_policy(2048, 36, width=128, reads=2) == LadderSizes(4, 128, 2)
        assert LadderSizes.for_policy(64, 2) == LadderSizes(2, 64, 2)
        assert LadderSizes.for_policy(64, 2, layers=5) == LadderSizes(5, 64, 3)


class TestSaving:
    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)
    def test_round_trip(self, family, tmp_path):
        policy = family.build_model()
        critic = SegmentValueHead.from_policy(policy, mode="ladder", reads=3)
        nn.init.normal_(critic.head.bias)
        critic.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "value_head.json",
            "value_head.safetensors",
            "ladder.safetensors",
        }
        loaded = SegmentValueHead.from_pretrained(tmp_path, policy=policy)
        assert loaded.mode == "ladder" and loaded.ladder.sizes == critic.ladder.sizes == LadderSizes(2, 64, 3)
        state, expected = loaded.state_dict(), critic.state_dict()
        assert state.keys() == expected.keys() == dict(critic.named_parameters()).keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        assert load_file(tmp_path / "ladder.safetensors").keys() == critic.ladder.state_dict().keys()

    @TEXT_FAMILY
    def test_values_from_a_policys_own_hidden_states(self, family, tmp_path):
        """As a user reads a saved critic: beside the policy, with or without adapters."""
        policy = get_peft_model(family.build_model(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
        critic = SegmentValueHead.from_policy(policy, mode="ladder")
        ids, mask = torch.tensor([[0, 30, 40, 50], [60, 70, 80, 90]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        hidden = policy(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        read = [hidden[depth] for depth in critic.depths(policy)]
        values = critic(hidden_states=read, attention_mask=mask)
        assert critic.depths(policy) == [0, 2] and values.shape == (2, 4) and values.dtype == torch.float32
        critic.save_pretrained(tmp_path)
        loaded = SegmentValueHead.from_pretrained(tmp_path, policy=policy)
        assert torch.equal(loaded(hidden_states=read, attention_mask=mask), values)

    @TEXT_FAMILY
    def test_shared_with_several_reads(self, family, tmp_path):
        critic = SegmentValueHead.from_policy(family.build_model(), mode="shared", reads=3)
        critic.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "value_head.json").read_text()) == {
            "mode": "shared",
            "hidden_size": 16,
            "reads": 3,
            "policy_layers": 2,
        }
        loaded = SegmentValueHead.from_pretrained(tmp_path)
        assert loaded.reads == 3 and torch.equal(loaded.head.weight, critic.head.weight)

    @TEXT_FAMILY
    def test_from_a_checkpoint_of_the_policy(self, family, tmp_path):
        family.build_model().save_pretrained(tmp_path)
        critic = SegmentValueHead.from_pretrained(tmp_path, mode="ladder", width=128)
        assert (critic.mode, critic.hidden_size, critic.ladder.sizes) == ("ladder", 16, LadderSizes(2, 128, 2))

    @TEXT_FAMILY
    def test_refusals(self, family, tmp_path):
        policy = family.build_model()
        SegmentValueHead.from_policy(policy, mode="ladder").save_pretrained(tmp_path / "ladder")
        SegmentValueHead.from_policy(policy, mode="shared").save_pretrained(tmp_path / "shared")
        with pytest.raises(ValueError, match="has `critic_width=64`, not 128: set `critic_width=64`"):
            SegmentValueHead.from_pretrained(tmp_path / "ladder", width=128)
        with pytest.raises(ValueError, match="has `critic_reads=1`, not 2"):
            SegmentValueHead.from_pretrained(tmp_path / "shared", reads=2)
        with pytest.raises(ValueError, match="saved in mode 'shared', not 'ladder': set `critic=.shared.`, or"):
            SegmentValueHead.from_pretrained(tmp_path / "shared", mode="ladder")
        with pytest.raises(ValueError, match="`critic_reads` is 4, but a policy of 2 layers"):
            SegmentValueHead.from_policy(policy, mode="ladder", reads=4)
        for mode in ("ladder", "shared"):
            with pytest.raises(ValueError, match="`critic_reads` (is 0.*|must be )at least 1"):
                SegmentValueHead.from_policy(policy, mode=mode, reads=0)
        for size, error in (
            ({"layers": 0}, "`critic_layers` must be at least 1, got 0"),
            ({"width": 0}, "`critic_width` must be at least 1, got 0"),
            ({"width": 130}, "`critic_width` must be a multiple of 64, as attention heads are, got 130"),
        ):
            with pytest.raises(ValueError, match=error):
                SegmentValueHead.from_policy(policy, mode="ladder", **size)
        SegmentValueHead(24, ladder=LadderSizes(2, 64, 2)).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="reads hidden states of size 24, but the policy's have size 16"):
            SegmentValueHead.from_pretrained(tmp_path / "other", policy=policy)
        policy.config.num_hidden_layers = 5
        for mode, reads in (("ladder", 3), ("shared", 2)):
            deeper = SegmentValueHead.from_policy(policy, mode=mode, reads=reads)
            deeper.save_pretrained(tmp_path / "deeper" / mode)
        policy.config.num_hidden_layers = 2
        for mode, reads in (("ladder", 3), ("shared", 2)):
            error = f"reads {reads} hidden states of a policy of 5 layers, but the policy has 2: use a critic that was"
            with pytest.raises(ValueError, match=error):
                SegmentValueHead.from_pretrained(tmp_path / "deeper" / mode, policy=policy)
        resumed = SegmentValueHead.from_policy(policy, mode="ladder", layers=3)
        with pytest.raises(ValueError, match="has `critic_layers=2`, not 3"):
            resumed.load_weights(tmp_path / "ladder")
