"""The memory planner: what can be counted on a CPU equals what is there; the rest is monotone and consistent."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from docs.generate.run_configs import FOLDER, RUNS
from docs.generate.scaling_table import DOCUMENT, changes_table, memory_table
from sapo_trl.cli import main as cli_main
from sapo_trl.critic.ladder import Ladder, LadderSizes
from sapo_trl.critic.value_head import SegmentValueHead
from sapo_trl.embedded import build_model, build_processor
from sapo_trl.planner import Lora, Setup, model_shape, plan_memory, suggest
from sapo_trl.planner.advice import nearest
from sapo_trl.planner.command import main, parser
from sapo_trl.planner.ladder import ladder_activation_bytes
from sapo_trl.planner.linear_attention import LinearAttention, linear_layer_activation_bytes
from sapo_trl.planner.memory import OVERHEAD_BYTES, cache_bytes, kv_bytes_per_token, layer_activation_bytes
from sapo_trl.planner.reading import read_setup
from sapo_trl.planner.setup import GIB
from sapo_trl.planner.shapes import PUBLISHED, lora_parameters


ROOT = Path(__file__).parents[2]
B7, B3 = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN3_5 = "geo3k_qwen3.5_4b_sapo.yaml"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[LlamaForCausalLM, str]:
    """A model, and a folder with nothing but its configuration."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    folder = tmp_path_factory.mktemp("tiny")
    config.save_pretrained(folder)
    return LlamaForCausalLM(config), str(folder)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------------------- shapes


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "published"),
        [
            (B3, 3_754_622_976),
            (B7, 8_292_166_656),
            ("Qwen/Qwen3-VL-4B-Thinking", 4_437_815_808),
            ("Qwen/Qwen3.5-4B", 4_539_265_536),
            ("realtreetune/rho-1b-sft-MATH", 1_100_048_384),
            ("realtreetune/deepseekmath-7b-sft-GSM8K", 6_910_365_696),
        ],
    )
    def test_known_models_have_the_published_number_of_parameters(self, name, published):
        assert model_shape(name).parameters == published

    def test_a_vision_language_model_is_counted_as_it_is(self):
        model = build_model()
        shape = model_shape("embedded")
        assert shape.parameters == parameters(model)
        assert shape.backbone_parameters == parameters(model.base_model)
        assert shape.vision.layers == model.config.vision_config.depth

    def test_a_folder_is_counted_as_it_is(self, tiny):
        model, folder = tiny
        shape = model_shape(folder)
        assert shape.parameters == parameters(model)
        assert shape.backbone_parameters == parameters(model.model)
        assert shape.largest_layer_parameters == parameters(model.model.layers[0])
        assert shape.root_parameters == parameters(model) - parameters(model.model.layers)
        assert shape.embedding_parameters == shape.head_parameters == 3200
        assert shape.vision is None

    def test_adapters_are_counted_as_they_are(self, tiny):
        model, folder = tiny
        config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=list(ALL_LINEAR))
        adapted = get_peft_model(LlamaForCausalLM(model.config), config)
        assert lora_parameters(folder, 3, ALL_LINEAR) == adapted.get_nb_trainable_parameters()[0]

    def test_an_unknown_model_is_an_error(self):
        with pytest.raises(ValueError, match="neither a folder with a config.json nor a model whose shape is known"):
            model_shape("Qwen/Qwen2.5-VL-72B")


# --------------------------------------------------------------------------------------------------- real bytes on CPU


def saved_bytes(model: torch.nn.Module, tokens: tuple[int, int], autocast: bool) -> float:
    """Bytes per token that autograd keeps in a forward, without parameters and their casts."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        is_weight = tensor.dim() == 2 and tensor.shape[0] % (tokens[0] * tokens[1]) != 0
        if storage.data_ptr() not in known and not is_weight:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        _output = model(input_ids=torch.zeros(tokens, dtype=torch.long), use_cache=False).last_hidden_state
    return sum(sizes.values()) / (tokens[0] * tokens[1])


class TestAgainstRealTensors:
    @pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
    @pytest.mark.parametrize(
        ("dtype", "autocast", "residual", "compute"),
        [
            (torch.float32, True, 4, 2),  # one GPU or DDP with bf16
            (torch.bfloat16, True, 2, 2),  # DeepSpeed, FSDP2, LoRA on a bf16 model
        ],
    )
    def test_activations_of_a_layer(self, config_class, dtype, autocast, residual, compute):
        def measure(layers: int) -> float:
            config = config_class(
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=layers,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=32,
                vocab_size=16,
            )
            return saved_bytes(AutoModel.from_config(config).to(dtype).train(), (2, 192), autocast)

        real = measure(3) - measure(2)
        planned = layer_activation_bytes(256, 704, 256, 64, residual, compute, config_class is Qwen3Config)
        assert planned == pytest.approx(real, rel=0.03)

    @pytest.mark.parametrize("kind", ["full_attention", "linear_attention"])
    @pytest.mark.parametrize(
        ("dtype", "autocast", "residual", "compute"), [(torch.float32, True, 4, 2), (torch.bfloat16, True, 2, 2)]
    )
    def test_activations_of_a_layer_of_qwen3_5(self, kind, dtype, autocast, residual, compute):
        linear = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
        linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 40}

        def measure(*kinds: str) -> float:
            config = Qwen3_5TextConfig(
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=len(kinds),
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=32,
                vocab_size=16,
                layer_types=list(kinds),
                **linear,
            )
            return saved_bytes(AutoModel.from_config(config).to(dtype).train(), (3, 192), autocast)

        others = ("full_attention", "linear_attention")
        real = measure(*others, kind) - measure(*others)
        if kind == "full_attention":
            planned = layer_activation_bytes(256, 704, 192, 64, residual, compute, True, True)
        else:
            planned = linear_layer_activation_bytes(256, 704, LinearAttention(1, 4, 8, 16, 40, 4), residual, compute)
        assert planned == pytest.approx(real, rel=0.03)

    def test_weights_gradients_and_adamw(self, tiny):
        _, folder = tiny
        model = LlamaForCausalLM(tiny[0].config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        resident = plan_memory(Setup(folder, critic="none", beta=0.0)).resident
        assert resident["policy"] == sum(p.nbytes for p in model.parameters())
        assert resident["gradients"] == sum(p.grad.nbytes for p in model.parameters())
        states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        assert resident["optimizer"] == sum(t.nbytes for t in states)

    @pytest.mark.parametrize("mode", ["separate", "shared", "adapter"])
    def test_critics(self, tiny, mode):
        _, folder = tiny
        policy = LlamaForCausalLM(tiny[0].config)
        lora = None
        if mode == "adapter":
            lora = Lora(3, ALL_LINEAR)
            policy = get_peft_model(
                policy, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=list(ALL_LINEAR), lora_dropout=0.0)
            )
        critic = SegmentValueHead.from_policy(policy, mode)
        plan = plan_memory(Setup(folder, critic=mode, lora=lora))
        assert plan.resident["critic"] == sum(p.nbytes for _, p in critic.learned_parameters())

    @pytest.mark.parametrize("sharding", ["none", "zero3"])
    def test_critics_that_read_the_policy_are_whole_everywhere(self, tiny, sharding):
        config, folder = tiny[0].config, tiny[1]
        none = plan_memory(Setup(folder, critic="none", processes=2, sharding=sharding)).resident
        for mode, sizes in (
            ("shared", {"reads": 3}),
            ("ladder", {}),
            ("ladder", {"layers": 3, "width": 128, "reads": 2}),
        ):
            critic = SegmentValueHead.from_policy(LlamaForCausalLM(config), mode, **sizes)
            size = sum(parameter.nbytes for parameter in critic.parameters())
            settings = {f"critic_{name}": size for name, size in sizes.items()}
            found = plan_memory(Setup(folder, critic=mode, processes=2, sharding=sharding, **settings)).resident
            assert found["critic"] == size
            assert found["gradients"] - none["gradients"] == pytest.approx(size)
            assert found["optimizer"] - none["optimizer"] == pytest.approx(2 * size)

    @pytest.mark.parametrize(("layers", "width", "reads"), [(2, 128, 2), (3, 320, 4)])
    @pytest.mark.parametrize(
        ("dtype", "autocast", "compute"),
        [(torch.float32, True, 2), (torch.bfloat16, False, 2), (torch.float32, False, 4)],
    )
    def test_activations_of_a_ladder(self, layers, width, reads, dtype, autocast, compute):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.ladder = Ladder(256, LadderSizes(layers, width, reads))

            def forward(self, input_ids, use_cache):
                states = [torch.randn(*input_ids.shape, 256, dtype=dtype) for _ in range(reads)]
                taken = [self.ladder.take(index, state) for index, state in enumerate(states)]
                return SimpleNamespace(last_hidden_state=self.ladder(taken, torch.ones_like(input_ids)))

        real = saved_bytes(Model(), (2, 192), autocast)
        assert ladder_activation_bytes(LadderSizes(layers, width, reads), 256, compute) == pytest.approx(
            real, rel=0.03
        )

    def test_a_ladder_beside_a_policys_backward(self):
        """With checkpointing its projected states alone are kept; either way it is a small part of the policy's."""
        for checkpointing, share in ((True, 0.1), (False, 0.05)):
            setup = Setup(B3, critic="ladder", gradient_checkpointing=checkpointing)
            found = plan_memory(setup).phases["learning"]["activations"]
            without = plan_memory(setup.changed(critic="none")).phases["learning"]["activations"]
            if checkpointing:
                assert found - without == 3072 * 4 * 2 * 512
            assert 0 < found - without < share * without

    def test_kv_cache(self, tiny):
        model, folder = tiny
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.zeros((2, 5), dtype=torch.long), past_key_values=cache)
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert kv_bytes_per_token(model_shape(folder), 4) * 10 == real

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
    def test_cache_with_linear_attention(self, dtype, size, tmp_path):
        """Keys and values in the layers with full attention alone; a state that does not grow in the others."""
        config = Qwen3_5TextConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
        )
        config.save_pretrained(tmp_path)
        shape = model_shape(str(tmp_path))
        model, cache = Qwen3_5ForCausalLM(config).to(dtype).eval(), DynamicCache(config=config)
        found = {}
        for tokens in (70, 71):
            with torch.no_grad():
                length = 70 if tokens == 70 else 1
                model(input_ids=torch.zeros((2, length), dtype=torch.long), past_key_values=cache)
            grown = [layer for layer in cache.layers if hasattr(layer, "keys")]
            states = [layer for layer in cache.layers if not hasattr(layer, "keys")]
            assert (len(grown), len(states)) == (2, 6)
            found[tokens] = sum(layer.keys.nbytes + layer.values.nbytes for layer in grown)
            found[tokens] += sum(layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes for layer in states)
            assert found[tokens] == 2 * cache_bytes(shape, tokens, size)
        assert found[71] - found[70] == 2 * kv_bytes_per_token(shape, size)

    def test_pixels(self):
        processor, model = build_processor(), build_model()
        inputs = processor(images=[Image.new("RGB", (56, 84))], text="<|image_pad|>", return_tensors="pt")
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        setup = Setup("embedded", image_tokens=tokens, compares_images=True)
        found = plan_memory(setup).phases["corrupted forward"]["corrupted pixels"]
        assert found == 4 * inputs["pixel_values"].nbytes and tokens > 1  # a rollout of four


# ------------------------------------------------------------------------------------------------------ hand formulas


class TestByHand:
    P, C, N = 8_292_166_656, 7_747_169_280 + 3585, 8
    # bytes of weights, gradients and optimizer per trained parameter, and of the reference
    EXPECTED = {
        "none": (4, 4 + 4, 8, 4),
        "zero2": (2, 2 / 8, 12 / 8, 2),
        "zero3": (2 / 8, 2 / 8, 12 / 8, 2 / 8),
        "fsdp2": (4 / 8, 4 / 8, 8 / 8, 4 / 8),
    }

    @pytest.mark.parametrize("sharding", EXPECTED)
    def test_resident(self, sharding):
        weight, gradient, states, reference = self.EXPECTED[sharding]
        resident = plan_memory(Setup(B7, processes=self.N, sharding=sharding)).resident
        assert resident["policy"] == pytest.approx(weight * self.P)
        assert resident["critic"] == pytest.approx(weight * self.C)
        assert resident["reference"] == pytest.approx(reference * self.P)
        assert resident["gradients"] == pytest.approx(gradient * (self.P + self.C))
        assert resident["optimizer"] == pytest.approx(states * (self.P + self.C))
        assert resident["overhead"] == OVERHEAD_BYTES

    def test_no_reference_without_kl_or_with_an_adapter(self):
        assert plan_memory(Setup(B7, beta=0.0)).resident["reference"] == 0
        assert plan_memory(Setup(B7, lora=Lora(8, "all-linear"))).resident["reference"] == 0

    def test_lora_keeps_the_base_once_as_loaded(self):
        setup = Setup(B3, lora=Lora(8, ALL_LINEAR), critic="adapter", weight_bytes=2)
        adapter = lora_parameters(B3, 8, ALL_LINEAR)
        resident = plan_memory(setup).resident
        assert resident["policy"] == 2 * 3_754_622_976 + 4 * adapter
        assert resident["critic"] == 4 * (adapter + 2049)
        assert resident["optimizer"] == 8 * (2 * adapter + 2049)
        # Four bits and a scale in 64 numbers, but for the embeddings, which are the head too.
        quantized = plan_memory(setup.changed(quantized_bits=4)).resident["policy"] - 4 * adapter
        whole = 2 * 151936 * 2048
        assert quantized == pytest.approx((3_754_622_976 - whole) * 0.5625 + 2 * whole)

    def test_checkpointing(self):
        def activations(**changes):
            return plan_memory(Setup("realtreetune/rho-1b-sft-MATH").changed(**changes)).phases["learning"]

        h, f, q, k, layers, tokens = 2048, 5632, 2048, 256, 22, 3072
        layer = 2 * 8 * h + 5 * 2 * h + 2 * 2 * (q + k) + 8 * f
        last = (4 + 4 + 2) * h
        assert activations()["activations"] == tokens * (layers * 4 * h + layer + last)
        full = activations(gradient_checkpointing=False)["activations"]
        assert full == tokens * (layers * layer + last)

    def test_a_forward_with_corrupted_images(self):
        """Without gradient it is a phase of its own. With gradient there are two graphs at a time."""
        setup = Setup(B7, micro_batch=2)
        plain, seen = plan_memory(setup), plan_memory(setup.changed(compares_images=True))
        assert {**seen.phases, "corrupted forward": {}} == {**plain.phases, "corrupted forward": {}}
        pixels = 4 * 512 * 4 * 1176  # of one response: 512 tokens of 4 patches
        assert seen.phases["corrupted forward"]["corrupted pixels"] == 8 * pixels
        assert 0 < seen.phases["corrupted forward"]["corrupted activations"] < plain.phases["learning"]["activations"]
        learning = plan_memory(setup.changed(compares_images=True, compares_with_gradient=True)).phases["learning"]
        assert learning["activations"] == plain.phases["learning"]["activations"]
        assert learning["corrupted activations"] == learning["activations"] + 4 * 2 * 2048 * 3584
        assert learning["corrupted pixels"] == 2 * pixels

    def test_logits_are_never_whole(self):
        setup = Setup(B7, micro_batch=8, gradient_checkpointing=True)
        whole = 4 * 8 * 2048 * 152064
        assert plan_memory(setup).phases["learning"]["LM head"] < whole / 2

    def test_vllm_needs_its_weights_inside_its_share(self):
        plan = plan_memory(Setup(B7, processes=8, sharding="zero3", vllm="colocate", vllm_share=0.2))
        assert plan.vllm_shortage > 0 and not plan.fits
        plan = plan_memory(plan.setup.changed(vllm_share=0.3))
        assert plan.vllm_shortage == 0 and plan.fits
        assert plan.resident["vLLM"] == pytest.approx(24 * GIB)
        room = 24 * GIB - 2 * GIB - 2 * self.P
        assert plan.kv_cache_rows == pytest.approx(room / (3072 * 2 * 2 * 28 * 512))

    def test_a_sleeping_vllm_needs_nothing_while_learning(self):
        plan = plan_memory(Setup(B3, vllm="colocate", vllm_share=0.3, vllm_sleeps=True))
        assert "vLLM" not in plan.resident
        assert plan.phases["sampling"]["vLLM"] == pytest.approx(24 * GIB)

    def test_transformers_generates_the_rollout_at_once(self):
        setup = Setup(B3, micro_batch=2, accumulation=4, mini_batches=4, weight_bytes=2, lora=Lora(8, ALL_LINEAR))
        cache = plan_memory(setup).phases["sampling"]["KV cache"]
        assert cache == 32 * 3072 * 2 * 36 * 256 * 2


# -------------------------------------------------------------------------------------------------------- consistency


SETUPS = st.builds(
    Setup,
    model=st.sampled_from([B3, B7, "realtreetune/rho-1b-sft-MATH"]),
    processes=st.sampled_from([1, 2, 8]),
    sharding=st.sampled_from(["none", "zero2", "zero3", "fsdp2"]),
    micro_batch=st.sampled_from([1, 2, 6]),
    accumulation=st.integers(1, 8),
    gradient_checkpointing=st.booleans(),
    critic=st.sampled_from(["none", "shared", "ladder", "separate"]),
    beta=st.sampled_from([0.0, 0.01]),
    lora=st.sampled_from([None, Lora(8, ALL_LINEAR)]),
    vllm=st.sampled_from([None, "colocate", "server"]),
    vllm_share=st.sampled_from([0.2, 0.3, 0.6]),
    gpu_memory_gib=st.sampled_from([16.0, 24.0, 40.0, 80.0]),
)


class TestConsistency:
    @given(setup=SETUPS, more=st.integers(1, 64))
    @settings(max_examples=25, deadline=None)
    def test_more_gpus_never_need_more_of_each(self, setup, more):
        for sharding in ("zero2", "zero3", "fsdp2"):
            setup = setup.changed(sharding=sharding)
            assert plan_memory(setup.changed(processes=setup.processes + more)).total <= plan_memory(setup).total

    @given(setup=SETUPS, more=st.integers(1, 4096))
    @settings(max_examples=25, deadline=None)
    def test_more_tokens_never_need_less(self, setup, more):
        total = plan_memory(setup).total
        assert plan_memory(setup.changed(completion_length=2048 + more)).total >= total
        assert plan_memory(setup.changed(prompt_length=1024 + more)).total >= total
        assert plan_memory(setup.changed(image_tokens=min(512 + more, 1024))).total >= total
        assert plan_memory(setup.changed(micro_batch=setup.micro_batch + more)).total >= total

    @given(setup=SETUPS)
    @settings(max_examples=25, deadline=None)
    def test_what_saves_memory_never_needs_more(self, setup):
        total = plan_memory(setup).total
        assert plan_memory(setup.changed(gradient_checkpointing=True)).total <= total
        assert plan_memory(setup.changed(beta=0.0)).total <= total
        assert plan_memory(setup.changed(critic="none")).total <= total
        assert plan_memory(setup.changed(vllm_sleeps=True)).total <= total

    @given(setup=SETUPS)
    @settings(max_examples=25, deadline=None)
    def test_suggestions_fit_and_keep_the_batch(self, setup):
        for suggestion in suggest(setup):
            assert plan_memory(suggestion.setup).fits
            assert suggestion.setup.rollout_rows == setup.rollout_rows
            assert suggestion.setup.gpu_memory_gib == setup.gpu_memory_gib
            assert suggestion.setup.processes == setup.processes
            assert (suggestion.setup.sharding, suggestion.setup.critic) != ("zero3", "adapter")
            assert len(suggestion.changes) == len(set(suggestion.changes)) > 0

    @pytest.mark.parametrize(
        "wrong",
        [{"sharding": "zero1"}, {"processes": 0}, {"image_tokens": 2000}, {"vllm_ranks": 2}],
    )
    def test_impossible_setups_are_errors(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "vllm_ranks" not in wrong else "tensor_parallel"):
            Setup(B3, **wrong)


class TestSuggestions:
    def test_smallest_change_first(self):
        """A micro-batch no smaller than needed, and nothing else, where that is enough."""
        setup = Setup(B7, 8, "zero3", micro_batch=16, accumulation=1, vllm="colocate", gradient_checkpointing=True)
        assert not plan_memory(setup).fits
        best = suggest(setup)[0]
        assert best.changes == ("per_device_train_batch_size 16 → 8, gradient_accumulation_steps 1 → 2",)
        assert (best.setup.micro_batch, best.setup.accumulation) == (8, 2)
        assert best.setup.changed(micro_batch=16, accumulation=1) == setup

    def test_two_changes_where_one_is_not_enough(self):
        setup = Setup(B3, 8, "none", gradient_checkpointing=False, micro_batch=2, gpu_memory_gib=20.0)
        suggestions = suggest(setup)
        assert suggestions and all(len(suggestion.changes) == 2 for suggestion in suggestions)

    def test_none_where_nothing_helps(self):
        assert suggest(Setup(B7, gpu_memory_gib=8.0)) == []


class TestNearest:
    """More than three changes, where no three suffice."""

    SEVEN = Setup(B7, micro_batch=4, accumulation=4, gpu_memory_gib=24.0, vllm="colocate")

    def test_a_large_model_on_a_small_gpu(self):
        assert suggest(self.SEVEN) == []
        found = nearest(self.SEVEN)
        assert plan_memory(found.setup).verdict == "fits" and len(found.changes) > 3
        assert found.setup.quantized_bits == 4 and found.setup.vllm is None
        assert found.setup.gpu_memory_gib == 24.0 and found.setup.critic != "separate"

    @pytest.mark.parametrize("memory", [16.0, 24.0, 40.0])
    def test_no_change_can_be_left_out(self, memory):
        """By an independent search: each set-up with one of the changes undone needs more than there is, safely."""
        setup = self.SEVEN.changed(gpu_memory_gib=memory)
        found = nearest(setup).setup
        assert plan_memory(found).verdict == "fits"
        for undone in (
            {"quantized_bits": None},
            {"mini_batches": setup.mini_batches},
            {"completion_length": setup.completion_length},
        ):
            if any(getattr(found, name) != value for name, value in undone.items()):
                assert plan_memory(found.changed(**undone)).verdict != "fits"

    def test_where_nothing_fits_it_is_the_smallest(self):
        setup = self.SEVEN.changed(gpu_memory_gib=2.0)
        found = plan_memory(nearest(setup).setup)
        assert not found.fits and found.total < plan_memory(setup).total / 10

    @pytest.mark.parametrize(
        ("memory", "verdict"), [(1.19, "borderline"), (1.21, "fits"), (0.81, "borderline"), (0.79, "does not fit")]
    )
    def test_verdicts(self, memory, verdict):
        setup = Setup(B3, 8, "zero2")
        total = plan_memory(setup).total / GIB
        assert plan_memory(setup.changed(gpu_memory_gib=memory * total)).verdict == verdict


# ------------------------------------------------------------------------------------------------------------ command


def run_command(*arguments: str) -> tuple[int, str]:
    output = io.StringIO()
    code = main(arguments, Console(file=output, width=200))
    return code, output.getvalue()


class TestCommand:
    FILE = str(ROOT / FOLDER / "geo3k_qwen2.5_vl_7b_sapo.yaml")

    def test_fits_on_the_files_machine(self):
        code, output = run_command("--config", self.FILE)
        assert code == 0
        assert "8 x 80 GiB, sharding zero3; 4 x 4 x 8 responses per optimizer step" in output
        assert "Borderline: 70.1 of 80 GiB" in output

    @pytest.mark.parametrize(("memory", "expected"), [("75", 0), ("65", 1)])
    def test_borderline_above_the_memory_probably_does_not_fit(self, memory, expected):
        code, output = run_command("--config", self.FILE, "--gpu_memory_gib", memory)
        assert code == expected and "Borderline: " in output and f" of {memory} GiB." in output
        assert ("It probably does not fit." in output) == bool(expected)

    def test_says_what_would_help(self):
        code, output = run_command("--config", self.FILE, "--sharding", "zero2")
        assert code == 1
        assert "Does not fit" in output and "It would with --sharding zero3" in output

    def test_one_gpu_has_no_sharding_and_a_way_out(self):
        code, output = run_command("--config", self.FILE, "--num_processes", "1", "--gpu_memory_gib", "24")
        assert code == 1 and "1 x 24 GiB, sharding none" in output
        assert "Does not fit: " in output and "It would with" in output and "load_in_4bit: true" in output
        arguments, rest = parser().parse_known_args(
            ["--config", self.FILE, "--num_processes", "1", "--sharding", "zero3"]
        )
        assert read_setup(arguments, rest).sharding == "zero3"  # the user's own word

    def test_settings_can_be_changed(self):
        arguments, rest = parser().parse_known_args(
            ["--config", self.FILE, "--num_processes", "2", "--critic", "shared", "--per_device_train_batch_size", "8"]
        )
        setup = read_setup(arguments, rest)
        assert (setup.processes, setup.critic, setup.micro_batch, setup.accumulation) == (2, "shared", 8, 4)

    @pytest.mark.parametrize("in_file", [False, True])
    def test_presets_are_what_they_are_for_training(self, in_file, tmp_path):
        text = f"model_name_or_path: {B3}\noutput_dir: out\n" + ("preset: grpo\n" if in_file else "")
        (tmp_path / "mine.yaml").write_text(text)
        config = ["--config", str(tmp_path / "mine.yaml")]
        setup = read_setup(*parser().parse_known_args([*config, *([] if in_file else ["--preset", "grpo"])]))
        assert setup.critic == "none"
        assert read_setup(*parser().parse_known_args([*config, "--preset", "ppo"])).critic == "separate"

    @pytest.mark.parametrize(
        ("preset", "compares", "with_gradient"),
        [("grpo", False, False), ("vppo", True, False), ("srpo", True, False), ("papo", True, True)],
    )
    def test_corrupted_images(self, preset, compares, with_gradient, tmp_path):
        (tmp_path / "mine.yaml").write_text(f"model_name_or_path: {B3}\noutput_dir: out\npreset: {preset}\n")
        arguments = ["--config", str(tmp_path / "mine.yaml")]
        setup = read_setup(*parser().parse_known_args(arguments))
        assert (setup.compares_images, setup.compares_with_gradient) == (compares, with_gradient)
        _, output = run_command(*arguments)
        assert ("one more forward of the policy, with corrupted images" in output) == compares
        assert ("its activations count twice" in output) == with_gradient

    def test_linear_attention_is_a_weaker_estimate(self):
        assert "24 layers have linear attention" in run_command("--config", str(ROOT / FOLDER / QWEN3_5))[1]
        assert "linear attention" not in run_command("--config", self.FILE)[1]

    def test_image_tokens_are_half_of_the_prompt_unless_given(self):
        arguments = parser().parse_args(["--config", self.FILE, "--prompt_length", "3000"])
        assert read_setup(arguments).image_tokens == 1500

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config", "nowhere.yaml"], "no file and no run file of the package has the name 'nowhere.yaml'"),
            (["--config", FILE, "--model_name_or_path", "some/model"], "neither a folder with a config.json nor"),
            (["--config", FILE, "--optim", "lion_32bit"], "The memory of optim='lion_32bit' is not known"),
            (["--config", FILE, "--critic", "both"], "critic"),
            (["--config", FILE, "--crtic", "shared"], "crtic"),
            (["--config", FILE, "--num_machines", "2"], "'--num_machines' is of `accelerate launch`"),
        ],
    )
    def test_mistakes_are_named(self, arguments, message, capsys):
        with pytest.raises((SystemExit, ValueError)) as error:
            run_command(*arguments)
        assert message in capsys.readouterr().err + str(error.value)

    def test_is_a_subcommand(self, capsys):
        assert cli_main(["plan", "--config", str(ROOT / FOLDER / "embedded.yaml"), "--gpu_memory_gib", "16"]) == 0
        assert "embedded on 1 x 16 GiB" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- docs


class TestDocument:
    TEXT = (ROOT / DOCUMENT).read_text(encoding="utf-8")

    def test_memory_table_is_up_to_date(self):
        """Otherwise: `python -m docs.generate.scaling_table`."""
        table = memory_table(ROOT / FOLDER)
        assert table in self.TEXT
        assert "**" not in table  # every file fits on the machine it names
        assert all(f"`{run.name}`" in table for run in RUNS)

    def test_changes_table_is_up_to_date(self):
        """Otherwise: `python -m docs.generate.scaling_table`."""
        assert changes_table(ROOT / FOLDER) in self.TEXT

    def test_every_model_of_a_file_is_known(self):
        assert {run.model.id for run in RUNS} <= set(PUBLISHED)
