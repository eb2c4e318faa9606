"""
Memory of one GPU, item by item. `docs/scaling.md` states the assumptions.

`resident` memory stays allocated. Sampling, learning and the optimizer's update follow one another, and each needs
more memory for a while. So the peak is the resident memory plus the largest of the three.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .ladder import kept_activation_bytes, ladder_sizes
from .linear_attention import linear_layer_activation_bytes
from .setup import GIB, Setup
from .shapes import ModelShape, lora_parameters, model_shape


ERROR_MARGIN = 0.2
"""Relative error of a total: a judgement, because nothing has been measured on a GPU."""

OVERHEAD_BYTES = 2 * GIB
"""CUDA context, cuBLAS workspaces, NCCL buffers and fragmentation."""

VLLM_OVERHEAD_BYTES = 2 * GIB
"""vLLM's profiling forward and CUDA graphs, inside its share."""

# Defaults of DeepSpeed, in numbers: parameters that stage 3 keeps gathered, and the bucket of gradients.
_ZERO3_LIVE = 1_000_000_000
_ZERO_BUCKET = 500_000_000

# TRL's fused LM head works on tiles of so many tokens by so many words.
_HEAD_TILE = 4096 * 32768


@dataclass(frozen=True)
class MemoryPlan:
    """
    Bytes on one GPU.

    Args:
        setup ([`Setup`]): the planned setup.
        resident (`dict[str, float]`): memory that stays allocated, by name.
        phases (`dict[str, dict[str, float]]`): additional memory of each phase, by name.
        vllm_shortage (`float`): bytes that vLLM lacks inside its share to hold the weights and one sequence.
        kv_cache_rows (`float`): sequences of full length whose keys and values fit at a time.
    """

    setup: Setup
    resident: dict[str, float]
    phases: dict[str, dict[str, float]]
    vllm_shortage: float = 0.0
    kv_cache_rows: float = field(default=float("nan"))

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def fits(self) -> bool:
        """Whether the peak fits on the GPU, and the weights into vLLM's share."""
        return self.total <= self.setup.gpu_memory_gib * GIB and self.vllm_shortage <= 0

    @property
    def verdict(self) -> Literal["fits", "borderline", "does not fit"]:
        """`"borderline"` if the estimate's error decides."""
        if self.vllm_shortage > 0:
            return "does not fit"
        total, available = self.total / GIB, self.setup.gpu_memory_gib
        if abs(total - available) < ERROR_MARGIN * total:
            return "borderline"
        return "fits" if total <= available else "does not fit"


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a number, as the setup's engine holds it: whole, or this process's share."""

    weight: float
    frozen: float
    reference: float
    gradient: float
    states: float
    residual: int
    compute: int


def plan_memory(setup: Setup) -> MemoryPlan:
    """
    Compute a plan.

    Args:
        setup ([`Setup`]): model, settings and machine.

    Raises:
        ValueError: for an unknown model.
    """
    shape = model_shape(setup.model)
    each = _bytes(setup)
    trained, frozen = _policy_parameters(setup, shape)
    critic, reader = _critic_parameters(setup, shape), _reader_parameters(setup, shape)
    resident = {
        "policy": trained * each.weight + frozen,
        "critic": critic * each.weight + reader * 4,
        "reference": _reference_parameters(setup, shape) * each.reference,
        "gradients": (trained + critic) * each.gradient + reader * 4,
        "optimizer": (trained + critic) * each.states + reader * 4 * setup.optimizer_states,
        "rollout buffer": _rollout_buffer(setup, shape),
        "overhead": OVERHEAD_BYTES,
    }
    share = setup.vllm_share * setup.gpu_memory_gib * GIB if setup.vllm == "colocate" else 0.0
    if share and not setup.vllm_sleeps:
        resident["vLLM"] = share
    phases = {
        "sampling": _sampling(setup, shape, share if setup.vllm_sleeps else 0.0),
        "learning": _learning(setup, shape, each, trained, critic),
        "update": {"float32 gradients": 4 * max(trained, critic) / setup.processes if _deepspeed(setup) else 0.0},
    }
    if setup.compares_images:
        phases["corrupted forward"] = _corrupted_forward(setup, shape, each)
    shortage, rows = _vllm_room(setup, shape, share)
    return MemoryPlan(setup, resident, phases, shortage, rows)


def _deepspeed(setup: Setup) -> bool:
    return setup.sharding in ("zero2", "zero3")


def _bytes(setup: Setup) -> _Bytes:
    n, loaded, states = setup.processes, setup.weight_bytes, setup.optimizer_states
    if setup.sharding == "none":
        trained = 4 if setup.lora else loaded  # PEFT makes adapters float32 for any base model
        ddp_buckets = trained if n > 1 else 0  # DDP reduces copies of the gradients
        compute = 2 if setup.mixed_precision else loaded
        return _Bytes(trained, loaded, loaded, trained + ddp_buckets, states * trained, loaded, compute)
    if setup.sharding == "fsdp2":  # float32 shards, half precision while a layer runs
        compute = 2 if setup.mixed_precision else 4
        return _Bytes(4 / n, loaded / n, loaded / n, 4 / n, states * 4 / n, compute, compute)
    # DeepSpeed holds half-precision weights and, sharded, the optimizer's float32 ones.
    half = 2 if setup.mixed_precision else 4
    master = 4 if setup.mixed_precision else 0
    whole = n if setup.sharding == "zero3" else 1
    return _Bytes(half / whole, half / whole, half / whole, half / n, (master + 4 * states) / n, half, half)


def _policy_parameters(setup: Setup, shape: ModelShape) -> tuple[int, float]:
    """Trained parameters, and bytes of the frozen ones."""
    if setup.lora is None:
        return shape.parameters, 0.0
    adapter = lora_parameters(setup.model, setup.lora.rank, setup.lora.targets)
    if setup.quantized_bits is None:
        return adapter, shape.parameters * _bytes(setup).frozen
    # Linear layers are quantized, with one scale in 64 numbers; embeddings and head stay in half precision.
    whole = min(shape.embedding_parameters + shape.head_parameters, shape.parameters)
    per_number = setup.quantized_bits / 8 + 1 / 16
    sharded = setup.processes if setup.sharding in ("zero3", "fsdp2") else 1
    return adapter, ((shape.parameters - whole) * per_number + 2 * whole) / sharded


def _critic_parameters(setup: Setup, shape: ModelShape) -> int:
    head = shape.hidden + 1
    if setup.critic == "separate":
        return shape.backbone_parameters + head
    if setup.critic == "adapter" and setup.lora is not None:
        return lora_parameters(setup.model, setup.lora.rank, setup.lora.targets) + head
    return 0


def _reader_parameters(setup: Setup, shape: ModelShape) -> int:
    """Parameters of a critic that reads the policy's hidden states: in float32, and whole on every GPU."""
    if setup.critic == "shared":
        return (setup.critic_reads or 1) * shape.hidden + 1
    if setup.critic != "ladder":
        return 0
    sizes = ladder_sizes(setup, shape)
    return sizes.parameters(shape.hidden) + sizes.width + 1


def _reference_parameters(setup: Setup, shape: ModelShape) -> int:
    """A reference model; with an adapter it is the base model, which is in memory anyway."""
    return shape.parameters if setup.beta != 0 and setup.lora is None else 0


def _image_tokens(setup: Setup, shape: ModelShape) -> int:
    return setup.image_tokens if shape.vision is not None else 0


def _pixel_bytes(setup: Setup, shape: ModelShape) -> float:
    """Float32 pixels of one response's prompt."""
    if shape.vision is None:
        return 0.0
    return 4.0 * _image_tokens(setup, shape) * shape.vision.patches_per_token * shape.vision.patch_values


def _rollout_buffer(setup: Setup, shape: ModelShape) -> float:
    """A rollout's tensors: pixels and a dozen numbers a token."""
    return setup.rollout_rows * (_pixel_bytes(setup, shape) + 12 * 4 * setup.sequence_length)


def kv_bytes_per_token(shape: ModelShape, number_bytes: int = 2) -> int:
    """Bytes of one token's keys and values in all layers with full attention."""
    return 2 * shape.full_attention_layers * shape.key_width * number_bytes


def cache_bytes(shape: ModelShape, tokens: int, number_bytes: int = 2) -> int:
    """Bytes of one sequence's cache: keys and values of its tokens, and the states of linear-attention layers."""
    states = shape.linear_attention.state_bytes(number_bytes) if shape.linear_attention is not None else 0
    return tokens * kv_bytes_per_token(shape, number_bytes) + states


def layer_activation_bytes(
    hidden: int,
    intermediate: int,
    query_width: int,
    key_width: int,
    residual_bytes: int,
    compute_bytes: int,
    normalizes_queries: bool = False,
    gates_attention: bool = False,
) -> float:
    """
    Bytes that the backward of one layer needs, per token.

    Counted from transformers' code for a layer with RMSNorm, SDPA attention and a gated feed-forward part: all tensors
    that autograd saves, except the parameters. The attention matrix is not among them.

    Args:
        hidden (`int`): width of the hidden states.
        intermediate (`int`): width inside the feed-forward part.
        query_width (`int`): heads times head size.
        key_width (`int`): key-value heads times head size.
        residual_bytes (`int`): bytes of a number between layers, which has the loaded weights' dtype.
        compute_bytes (`int`): bytes of a number inside of matrix products.
        normalizes_queries (`bool`, *optional*, defaults to `False`): whether queries and keys are normalized.
        gates_attention (`bool`, *optional*, defaults to `False`):
            whether the attention's output is gated, as in Qwen3.5. Such a model's norms stay in float32.
    """
    # A norm keeps its input in float32, and its output before the weight; the products keep theirs.
    norms = 2 * (4 + (4 if gates_attention else residual_bytes)) * hidden
    # Under autocast float32 inputs are cast once for each of the five matrices that read them.
    inputs = (5 if residual_bytes != compute_bytes else 2) * compute_bytes * hidden
    attention = 2 * compute_bytes * (query_width + key_width)
    if normalizes_queries:
        attention += (4 + (4 if gates_attention else compute_bytes)) * (query_width + key_width)
    if gates_attention:  # the attention's output in another layout, the gate, and the gated output
        attention += 3 * compute_bytes * query_width
    return norms + inputs + attention + 4 * compute_bytes * intermediate


def activation_bytes(setup: Setup, shape: ModelShape, residual_bytes: int, compute_bytes: int) -> float:
    """
    Bytes that one model's backward needs for a micro-batch: all layers, or with checkpointing the layers' inputs and
    one recomputed layer.
    """
    layer = layer_activation_bytes(
        shape.hidden,
        shape.intermediate,
        shape.query_width,
        shape.key_width,
        residual_bytes,
        compute_bytes,
        shape.normalizes_queries,
        shape.gates_attention,
    )
    if setup.lora is not None:  # each adapter casts its input
        layer += compute_bytes * (shape.hidden + shape.query_width)
    layers = [layer] * shape.full_attention_layers
    if shape.linear_attention is not None:
        sizes = shape.linear_attention
        linear = linear_layer_activation_bytes(shape.hidden, shape.intermediate, sizes, residual_bytes, compute_bytes)
        if setup.lora is not None:
            linear += compute_bytes * (shape.hidden + sizes.value_width)
        layers += [linear] * sizes.layers
    text = _stack(layers, shape.hidden * residual_bytes, setup.gradient_checkpointing)
    last_norm = (4 + residual_bytes + compute_bytes) * shape.hidden
    per_row = setup.sequence_length * (text + last_norm)
    if shape.vision is not None:
        vision = shape.vision
        layer = layer_activation_bytes(
            vision.hidden, vision.intermediate, vision.hidden, vision.hidden, residual_bytes, compute_bytes
        )
        stack = _stack([layer] * vision.layers, vision.hidden * residual_bytes, setup.gradient_checkpointing)
        per_row += _image_tokens(setup, shape) * vision.patches_per_token * stack
    return setup.micro_batch * per_row


def _stack(layers: list[float], boundary: float, checkpointing: bool) -> float:
    return len(layers) * boundary + max(layers) if checkpointing else sum(layers)


def _learning(setup: Setup, shape: ModelShape, each: _Bytes, trained: int, critic_parameters: int) -> dict[str, float]:
    """One model's forward and backward at a time: the critic starts when the policy's activations are freed."""
    tokens = setup.micro_batch * setup.completion_length
    # The fused head has float32 gradients of its weights and of the completion's hidden states, and two tiles.
    head = 4.0 * tokens * shape.hidden + 2 * each.compute * _HEAD_TILE
    if setup.lora is None:
        head += 4.0 * shape.head_parameters
    half = 2 if setup.mixed_precision else 4
    engine = {"gathered weights": 0.0, "gradient buckets": 0.0, "half-precision copies": 0.0}
    largest = max(trained, critic_parameters)
    if setup.sharding == "zero3":
        engine["gathered weights"] = half * min(_ZERO3_LIVE, shape.parameters)
    if setup.sharding == "fsdp2":
        # Weights outside of blocks, the running block and the prefetched block.
        engine["gathered weights"] = half * (shape.root_parameters + 2 * shape.largest_layer_parameters)
        if setup.lora is None:
            engine["gradient buckets"] = half * (shape.root_parameters + shape.largest_layer_parameters)
    if _deepspeed(setup):
        engine["gradient buckets"] = half * min(_ZERO_BUCKET, largest)
    if setup.sharding == "none" and each.residual != each.compute:
        # Autocast keeps its copies of the weights until the forward ends.
        engine["half-precision copies"] = each.compute * (shape.parameters - shape.embedding_parameters)
    ladder = kept_activation_bytes(setup, shape, each.compute) if setup.critic == "ladder" else 0.0
    activations = activation_bytes(setup, shape, each.residual, each.compute)
    corrupted = {}
    if setup.compares_with_gradient:  # a second graph, whose backward begins when both are there
        corrupted["corrupted activations"] = activations + 4.0 * tokens * shape.hidden
        corrupted["corrupted pixels"] = setup.micro_batch * _pixel_bytes(setup, shape)
    return {"activations": activations + ladder, **corrupted, "LM head": head, **engine}


def _corrupted_forward(setup: Setup, shape: ModelShape, each: _Bytes) -> dict[str, float]:
    """One more forward over the rollout, without gradient: a copy of all pixels, and the tensors of one layer."""
    # As with checkpointing, but no layer's input is kept: these have 0 bytes.
    one_layer = activation_bytes(setup.changed(gradient_checkpointing=True), shape, 0, each.compute)
    return {"corrupted pixels": setup.rollout_rows * _pixel_bytes(setup, shape), "corrupted activations": one_layer}


def _sampling(setup: Setup, shape: ModelShape, awake_vllm: float) -> dict[str, float]:
    if setup.vllm is not None:
        return {"vLLM": awake_vllm}
    number = 4 if _bytes(setup).residual == 4 else 2
    rows = setup.rollout_rows
    gathered = 0.0
    if setup.sharding in ("zero3", "fsdp2"):  # all weights stay gathered while it generates
        gathered = float(number * shape.parameters)
    return {
        "KV cache": float(rows * cache_bytes(shape, setup.sequence_length, number)),
        # One layer over all prompts at once.
        "prefill": float(rows * setup.prompt_length * number * (3 * shape.intermediate + 4 * shape.hidden)),
        "next-token scores": 3.0 * 4 * rows * shape.vocabulary,
        "gathered weights": gathered,
    }


def _vllm_room(setup: Setup, shape: ModelShape, share: float) -> tuple[float, float]:
    """Bytes that a colocated vLLM lacks, and sequences that its cache holds per process."""
    if setup.vllm != "colocate":
        return 0.0, float("nan")
    length = setup.vllm_length or setup.sequence_length
    cache = share - VLLM_OVERHEAD_BYTES - 2 * shape.parameters / setup.vllm_ranks
    one_row, full_row = (cache_bytes(shape, tokens) / setup.vllm_ranks for tokens in (length, setup.sequence_length))
    return max(0.0, one_row - cache), max(0.0, cache / full_row / setup.vllm_ranks)
