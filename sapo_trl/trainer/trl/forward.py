"""How models run over completions: the policy, a reference and a critic all pass through TRL's one forward."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ...config import SAPOConfig
from ...critic.value_head import SegmentValueHead, backbone_of
from ...distributed import weights_are_in_pieces, whole_lm_head
from ...rollouts.placeholders import hide_placeholders
from ...rollouts.prompts import has_images_by_row, one_entry_a_row
from ...rollouts.types import PolicyForward, RolloutBatch
from ...segments import accumulation_dtype
from ..image_features import ImageFeatures, ImageKey, image_keys
from ..padding import RightAligned, equal_groups, group_rows, merge_rows, take_rows, token_positions
from ..policy_reader import PolicyReader
from ..virtual_tokens import real_columns


# The arguments of TRL's forward besides the model. Multimodal tensors are forwarded by name, so that a key that a new
# TRL version adds passes through.
FORWARD_KEYS = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[2:]
# These say how to compute. The others have a row for each response, or hold the images.
_OPTIONS = ("logits_to_keep", "compute_entropy", "compute_aux_loss")


class TokenOutputs(NamedTuple):
    """The three results of TRL's forward, and the values that a critic reads off the policy meanwhile."""

    logps: torch.Tensor  # float (B, T); the values, if the model is a critic
    entropies: torch.Tensor | None  # float (B, T)
    aux_loss: torch.Tensor | None  # (), the load-balancing loss of a mixture of experts
    values: torch.Tensor | None  # float32 (B, T)

    def of_policy(self) -> PolicyForward:
        """The same as a [`PolicyForward`], in float32 or wider."""
        logps, entropies = (x.to(accumulation_dtype(x)) for x in (self.logps, self.entropies))
        return PolicyForward(logps, entropies, self.values, self.aux_loss)


class CompletionForward:
    """
    Runs models over the completions of a batch.

    Args:
        trl_forward (`Callable`): `GRPOTrainer._get_per_token_logps_and_entropies`, bound to the trainer.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
        args ([`SAPOConfig`]): settings of the run.
        policy ([`~transformers.PreTrainedModel`]): wrapped or not. Other models are given inputs in the same layout.
        moves_rows (`bool`): whether rows may be moved and grouped to save padding.
        pad_token_id (`int`): token that completions are padded with.
        placeholder_ids (`Collection[int]`): tokens that stand for a piece of an image.
        has_aux_loss (`bool`): whether the policy is a mixture of experts whose load-balancing loss is trained on.
        reading_critic (`Callable`, *optional*): returns the critic that reads the policy's hidden states.
        image_features ([`ImageFeatures`], *optional*): keeps the features of a rollout's images.
    """

    def __init__(
        self,
        trl_forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
        accelerator: Accelerator,
        args: SAPOConfig,
        policy: PreTrainedModel,
        *,
        moves_rows: bool,
        pad_token_id: int,
        placeholder_ids: Collection[int] = (),
        has_aux_loss: bool = False,
        reading_critic: Callable[[], SegmentValueHead] | None = None,
        image_features: ImageFeatures | None = None,
    ):
        self.trl_forward = trl_forward
        self.accelerator = accelerator
        self.pad_to_multiple_of = args.pad_to_multiple_of
        self.moves_rows = moves_rows
        self.pad_token_id = pad_token_id
        self.placeholder_ids = placeholder_ids
        self.has_aux_loss = has_aux_loss
        self.reading_critic = reading_critic
        self.image_features = image_features
        backbone = self.backbone_of(policy)
        text_config = backbone.config.get_text_config()
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self._positions_follow_images = "mrope_section" in (getattr(text_config, "rope_parameters", None) or {})

    def policy(
        self, model: nn.Module, batch: RolloutBatch, rows: int | None = None, frozen: bool = False
    ) -> PolicyForward:
        """
        Run the policy.

        Args:
            model (`torch.nn.Module`): the policy, wrapped or not.
            batch (`RolloutBatch`): a rollout or a micro-batch.
            rows (`int`, *optional*): rows of a forward; all at once by default.
            frozen (`bool`, *optional*, defaults to `False`):
                whether only the values of a critic that reads the policy carry gradients.

        Returns:
            [`PolicyForward`]
        """
        critic_learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(critic_learns and not frozen):
            inputs = _inputs_of(batch) | {
                "compute_entropy": True,
                "compute_aux_loss": self.has_aux_loss and torch.is_grad_enabled(),
            }
            return self.run(model, inputs, rows, with_values=True, critic_learns=critic_learns).of_policy()

    def critic(self, critic: nn.Module, batch: RolloutBatch, rows: int | None = None) -> torch.Tensor:
        """
        Values of the states before each completion token.

        The critic takes the place of an LM head. So its inputs (images included) and the place of each output cannot
        differ from the policy's.

        Args:
            critic (`torch.nn.Module`): a [`SegmentValueHead`] with a backbone or an adapter, wrapped or not.
            batch (`RolloutBatch`): a rollout or a micro-batch.
            rows (`int`, *optional*): rows of a forward; all at once by default.

        Returns:
            `torch.Tensor`: float32 `(B, T)`.
        """

        def value_model(*, labels: torch.Tensor, fused_lm_head: bool, **model_inputs) -> SimpleNamespace:
            # Position p predicts token p + 1, and its value is the value of the state before token p + 1.
            return SimpleNamespace(log_probs=critic(**model_inputs)[:, :-1])

        value_head = self.accelerator.unwrap_model(critic)
        backbone = value_head.backbone if value_head.adapter is None else value_head.adapter.backbone
        return self.run(value_model, _inputs_of(batch), rows, backbone=backbone).logps

    def run(
        self,
        model: Callable,
        inputs: dict[str, Any],
        rows: int | None = None,
        *,
        backbone: PreTrainedModel | None = None,
        with_values: bool = False,
        critic_learns: bool | None = None,
    ) -> TokenOutputs:
        """
        TRL's forward, some rows at a time. Rows of similar length run together.

        Args:
            model (`Callable`): a causal language model, or a function that answers like one.
            inputs (`dict`): arguments of TRL's forward; also `image_keys` and `width` (of the longest row), if known.
            rows (`int`, *optional*): rows of a forward; all at once by default.
            backbone ([`~transformers.PreTrainedModel`], *optional*): the transformer in the model; found by default.
            with_values (`bool`, *optional*, defaults to `False`): whether a critic reads the hidden states.
            critic_learns (`bool`, *optional*): whether its values carry gradients; by default if others do.

        Returns:
            [`TokenOutputs`]
        """
        backbone = self.backbone_of(model) if backbone is None else backbone
        read = None
        if with_values and self.reading_critic is not None:
            learns = torch.is_grad_enabled() if critic_learns is None else critic_learns
            read = PolicyReader(self.reading_critic(), learns)
        if has_images_by_row(inputs):
            inputs = {**inputs, "num_images": one_entry_a_row(inputs)}
        if "image_keys" not in inputs:
            inputs = {**inputs, "image_keys": self.image_keys(inputs, backbone)}
        total = inputs["input_ids"].size(0)
        if not self.moves_rows or rows is None or rows >= total:
            return self._run_rows(model, backbone, read, batch_size=rows, **inputs)

        options = {name: inputs[name] for name in _OPTIONS if name in inputs}
        left_out = {*_OPTIONS, "width"}
        merged = merge_rows([{k: v for k, v in inputs.items() if v is not None and k not in left_out}])
        lengths = inputs["attention_mask"].sum(1).tolist()
        num_groups = -(-total // rows)
        if weights_are_in_pieces(self.accelerator):
            # Processes wait for each other in each group. Equal groups are of similar size on all of them.
            groups = equal_groups(lengths, num_groups)
        else:
            groups = group_rows(lengths, num_groups, rows * inputs["input_ids"].size(1))
        outputs = [
            self._run_rows(
                model, backbone, read, width=max(lengths[row] for row in group), **options, **take_rows(merged, group)
            )
            for group in groups
        ]
        back = torch.tensor([row for group in groups for row in group], device=outputs[0].logps.device).argsort()
        logps, entropies, aux_losses, values = zip(*outputs, strict=True)
        return TokenOutputs(
            torch.cat(logps)[back],
            None if entropies[0] is None else torch.cat(entropies)[back],
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
            None if read is None else read.joined(values, back),
        )

    def backbone_of(self, model: nn.Module) -> PreTrainedModel:
        """The transformer under a model's LM head, without the wrappers of distributed training and compilation."""
        return backbone_of(self.accelerator.unwrap_model(model, keep_torch_compile=False))

    def image_keys(self, batch: RolloutBatch, backbone: PreTrainedModel) -> list[list[ImageKey]] | None:
        """A key for each image of each row; `None` if the model's image features are not kept."""
        inputs = [batch.get(name) for name in ("pixel_values", "image_grid_thw", "num_images")]
        kept = self.image_features is not None and self.image_features.are_kept_of(backbone)
        if not kept or any(value is None or not len(value) for value in inputs):
            return None
        pixel_values, grids, num_images = inputs
        keys = iter(image_keys(pixel_values, grids))
        return [list(itertools.islice(keys, number)) for number in num_images]

    def forget_images(self, model: nn.Module | None = None) -> None:
        """Forget the features of all models, or only the features of `model`."""
        if self.image_features is not None and model is None:
            self.image_features.clear()
        elif self.image_features is not None:
            self.image_features.forget(self.backbone_of(model))

    def _run_rows(
        self,
        model: Callable,
        backbone: PreTrainedModel,
        read: PolicyReader | None,
        *,
        width: int | None = None,
        image_keys: list[list[ImageKey]] | None = None,
        **inputs,
    ) -> TokenOutputs:
        """TRL's forward, also for rows without image and rows with too many placeholders."""
        length = inputs["logits_to_keep"]
        keys_of_rows = iter(image_keys or [])
        values: list[torch.Tensor] = []

        def run(**inputs):
            # TRL passes images to every chunk of a batch, if only none, and vision towers refuse empty tensors.
            inputs = {k: v for k, v in inputs.items() if not (torch.is_tensor(v) and v.numel() == 0)}
            if self.placeholder_ids:
                # The labels, which TRL has taken from the same ids, keep them.
                inputs = hide_placeholders(inputs, length, self.placeholder_ids, self.pad_token_id)
            if has_images_by_row(inputs) and not _has_tokens(inputs["input_ids"], self.placeholder_ids):
                inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "pixel_attention_mask")}
            # TRL's chunks of rows come one after the other.
            keys = itertools.chain(*itertools.islice(keys_of_rows, len(inputs["input_ids"])))
            if image_keys is not None:
                inputs = self.image_features.in_place_of_pixels(backbone, inputs, list(keys))
            aligned = None
            if self.moves_rows:
                aligned = RightAligned.of(inputs["attention_mask"], width, self.pad_to_multiple_of)
                inputs = aligned.move_inputs(inputs)
                if self._takes_positions and not (self._positions_follow_images and "image_grid_thw" in inputs):
                    # By default a model takes the column's number, which changes with the other rows. In half
                    # precision the rotation by another angle gives other log-probabilities.
                    inputs["position_ids"] = token_positions(inputs["attention_mask"])
            tapped = contextlib.nullcontext()
            if read is not None:
                tapped = read.tapped(
                    backbone,
                    inputs["attention_mask"],
                    lambda found: values.append(read.at_completion(found, aligned, length)),
                )
            with whole_lm_head(model), tapped:
                outputs = real_columns(model(**inputs), inputs["input_ids"].size(1) - 1)
            return outputs if aligned is None else aligned.restore_outputs(outputs)

        logps, entropies, aux_loss = self.trl_forward(run, **inputs)
        return TokenOutputs(logps, entropies, aux_loss, read.joined(values) if values else None)


def _has_tokens(ids: torch.Tensor, tokens: Collection[int]) -> bool:
    """Whether one of these tokens is among the ids."""
    return any(bool((ids == token).any()) for token in tokens)


def _inputs_of(batch: RolloutBatch) -> dict[str, Any]:
    """A batch as TRL's forward takes it, with the known keys of its images and its longest row."""
    inputs = {key: batch[key] for key in FORWARD_KEYS if key in batch}
    inputs["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs["logits_to_keep"] = batch["completion_ids"].size(1)
    if "token_counts" in batch:
        inputs["width"] = max(batch["token_counts"])
    if "image_keys" in batch:
        inputs["image_keys"] = batch["image_keys"]
    return inputs
