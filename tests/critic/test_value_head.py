"""The critic: a scalar head on a backbone of its own or on the policy's hidden states."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from sapo_trl import SegmentValueHead


ALL_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

IDS = torch.tensor([[20, 30, 40, 50], [60, 70, 80, 90]])


def hidden_size(policy) -> int:
    return policy.get_output_embeddings().in_features


class TestFromPolicy:
    @ALL_FAMILIES
    def test_copies_the_backbone_and_shares_no_memory(self, family):
        policy = family.build_model()
        critic = SegmentValueHead.from_policy(policy)
        assert critic.mode == "separate"
        theirs = {p.data_ptr() for p in policy.parameters()} | {b.data_ptr() for b in policy.buffers()}
        assert not theirs & {p.data_ptr() for p in critic.parameters()}
        assert not theirs & {b.data_ptr() for b in critic.buffers()}
        # All of the policy but its LM head.
        expected = {
            name.removeprefix("model."): parameter
            for name, parameter in policy.named_parameters()
            if not name.startswith("lm_head")
        }
        copied = dict(critic.backbone.named_parameters())
        assert copied.keys() == expected.keys()
        assert all(torch.equal(copied[name], expected[name]) for name in copied)

    @ALL_FAMILIES
    def test_values_are_the_head_on_the_last_hidden_states(self, family):
        policy = family.build_model().eval()
        critic = SegmentValueHead.from_policy(policy).eval()
        with torch.no_grad():
            hidden = policy.model(input_ids=IDS).last_hidden_state
            expected = (hidden * critic.head.weight[0]).sum(-1) + critic.head.bias
            values = critic(input_ids=IDS, attention_mask=torch.ones_like(IDS))
            torch.testing.assert_close(values, expected)
            torch.testing.assert_close(critic(hidden_states=hidden), expected)
        assert values.shape == IDS.shape and values.dtype == torch.float32

    @TEXT_FAMILY
    def test_initial_values_are_small_and_pass_a_gradient_on(self, family):
        torch.manual_seed(0)
        critic = SegmentValueHead.from_policy(family.build_model())
        values = critic(input_ids=IDS)
        assert 0 < values.detach().abs().max() < 1
        values.sum().backward()
        assert critic.backbone.embed_tokens.weight.grad.abs().max() > 0

    @ALL_FAMILIES
    def test_shared_has_a_head_only(self, family):
        policy = family.build_model()
        critic = SegmentValueHead.from_policy(policy, mode="shared")
        assert critic.mode == "shared"
        assert {name: tuple(p.shape) for name, p in critic.named_parameters()} == {
            "head.weight": (1, hidden_size(policy)),
            "head.bias": (1,),
        }
        with pytest.raises(ValueError, match="hidden_states"):
            critic(input_ids=IDS)

    @TEXT_FAMILY
    def test_frozen_parameters_stay_frozen(self, family):
        policy = family.build_model()
        policy.model.embed_tokens.requires_grad_(False)
        critic = SegmentValueHead.from_policy(policy)
        assert [n for n, p in critic.named_parameters() if not p.requires_grad] == ["backbone.embed_tokens.weight"]

    @TEXT_FAMILY
    def test_bfloat16_backbone_under_a_float32_head(self, family):
        critic = SegmentValueHead.from_policy(family.build_model().bfloat16())
        assert critic.backbone.dtype == torch.bfloat16
        assert critic.head.weight.dtype == torch.float32
        assert critic(input_ids=IDS).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = critic(input_ids=IDS)
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())

    @TEXT_FAMILY
    def test_padding_on_the_left_gives_no_nan_and_changes_nothing(self, family):
        critic = SegmentValueHead.from_policy(family.build_model()).eval()
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1)
        with torch.no_grad():
            values = critic(input_ids=padded, attention_mask=mask)
            assert values.isfinite().all()
            torch.testing.assert_close(values[:, 3:], critic(input_ids=IDS), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_adapters_are_merged(self, family):
        policy = family.build_model().eval()
        peft_policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, parameter in peft_policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        critic = SegmentValueHead.from_policy(peft_policy).eval()
        assert not any("lora" in name for name, _ in critic.named_parameters())
        assert all(parameter.requires_grad for parameter in critic.parameters())
        with torch.no_grad():
            adapted = peft_policy.base_model.model.model(input_ids=IDS).last_hidden_state
            with peft_policy.disable_adapter():
                plain = peft_policy.base_model.model.model(input_ids=IDS).last_hidden_state
            ours = critic.backbone(input_ids=IDS).last_hidden_state
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(ours, adapted, rtol=0, atol=1e-4)
        # The policy itself keeps its adapter.
        assert any("lora_A" in name for name, _ in peft_policy.named_parameters())

    @TEXT_FAMILY
    def test_quantized_policy_and_unknown_mode_are_refused(self, family):
        policy = family.build_model()
        with pytest.raises(ValueError, match="`mode` must be one of .*got 'both'"):
            SegmentValueHead.from_policy(policy, mode="both")
        policy.is_quantized = True
        with pytest.raises(ValueError, match='quantized policy.*critic="shared"'):
            SegmentValueHead.from_policy(policy)
        assert SegmentValueHead.from_policy(policy, mode="shared").mode == "shared"


class TestSaving:
    @ALL_FAMILIES
    def test_round_trip(self, family, tmp_path):
        critic = SegmentValueHead.from_policy(family.build_model())
        torch.nn.init.normal_(critic.head.bias)
        critic.save_pretrained(tmp_path / "new" / "critic")
        loaded = SegmentValueHead.from_pretrained(tmp_path / "new" / "critic")
        assert loaded.mode == "separate"
        state, expected = loaded.state_dict(), critic.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids=IDS), critic.eval()(input_ids=IDS))

    @TEXT_FAMILY
    def test_dtype_survives(self, family, tmp_path):
        SegmentValueHead.from_policy(family.build_model().bfloat16()).save_pretrained(tmp_path)
        loaded = SegmentValueHead.from_pretrained(tmp_path)
        assert loaded.backbone.dtype == torch.bfloat16 and loaded.head.weight.dtype == torch.float32
        loaded = SegmentValueHead.from_pretrained(tmp_path, dtype="float32")
        assert loaded.backbone.dtype == torch.float32

    @TEXT_FAMILY
    def test_shared_round_trip_and_files(self, family, tmp_path):
        critic = SegmentValueHead.from_policy(family.build_model(), mode="shared")
        critic.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"value_head.json", "value_head.safetensors"}
        assert load_file(tmp_path / "value_head.safetensors").keys() == {"weight", "bias"}
        assert json.loads((tmp_path / "value_head.json").read_text()) == {"mode": "shared", "hidden_size": 16}
        for loaded in (
            SegmentValueHead.from_pretrained(tmp_path),
            SegmentValueHead.from_pretrained(tmp_path, "shared"),
        ):
            assert loaded.mode == "shared" and torch.equal(loaded.head.weight, critic.head.weight)

    @TEXT_FAMILY
    def test_saved_in_another_mode(self, family, tmp_path):
        SegmentValueHead.from_policy(family.build_model(), mode="shared").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="saved in mode 'shared', not 'separate'"):
            SegmentValueHead.from_pretrained(tmp_path, mode="separate")

    @ALL_FAMILIES
    def test_from_a_checkpoint_of_the_policy(self, family, tmp_path):
        policy = family.build_model()
        policy.save_pretrained(tmp_path)
        critic = SegmentValueHead.from_pretrained(tmp_path, mode="separate")
        expected = {k.removeprefix("model."): v for k, v in policy.state_dict().items() if not k.startswith("lm_head")}
        state = critic.backbone.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        shared = SegmentValueHead.from_pretrained(tmp_path, mode="shared")
        assert shared.backbone is None and shared.head.in_features == hidden_size(policy)

    def test_nothing_there(self, tmp_path):
        with pytest.raises((OSError, ValueError)):
            SegmentValueHead.from_pretrained(tmp_path)
