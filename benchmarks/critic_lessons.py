"""The lessons of `critic_quality.py`: tasks, recorded responses of frozen policies, and tests of critics."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, PreTrainedModel, set_seed

from sapo_trl import SAPOConfig, SAPOTrainer, Segments, SegmentValueHead, embedded
from sapo_trl.critic.value_head import backbone_of
from sapo_trl.data import to_prompts
from sapo_trl.metrics import explained_variance
from sapo_trl.rewards import accuracy_reward
from sapo_trl.study import boxed
from sapo_trl.study import task as study_task
from sapo_trl.study.config import load_study
from sapo_trl.trainer.padding import merge_rows, take_rows


STUDY = load_study(Path(__file__).parents[1] / "trainer_configs" / "study" / "granularity.yaml")
LEARNED, HELD_OUT = STUDY.budget.rollouts * STUDY.budget.responses, 400
STATES, CONTINUATIONS = 192, 16


class Task(NamedTuple):
    """A task: its policy, its prompts by number, split and seed, its reward, and the tokens of a response at most."""

    title: str
    warm_start: Callable[[Path], Path]
    prompts: Callable[[int, str, int], Dataset]
    reward: Callable[..., list[float]]
    longest_response: int


def study_policy(cache_dir: Path) -> Path:
    config = study_task.WarmStartConfig(task=STUDY.tasks["picture_6"], size=STUDY.model, **STUDY.warm_start)
    return study_task.warm_start(cache_dir, config)


def study_prompts(n: int, split: str, seed: int) -> Dataset:
    problems = study_task.make_problems(STUDY.tasks["picture_6"], n, split=split, seed=seed)
    return study_task.to_task_prompts(problems)


DEMO = boxed.warm_start_config().task

TASKS = {
    "picture_6": Task(
        "Study, `picture_6`",
        study_policy,
        study_prompts,
        study_task.code_reward,
        study_task.longest_response(STUDY.tasks["picture_6"]),
    ),
    "demo": Task(
        "Demo",
        boxed.warm_start,
        lambda n, split, seed: to_prompts(study_task.make_problems(DEMO, n, split=split, seed=seed)),
        accuracy_reward,
        boxed.longest_response(DEMO),
    ),
    "embedded": Task(
        "Embedded geometry task",
        embedded.warm_start,
        lambda n, split, seed: to_prompts(embedded.make_problems(n, split=split, seed=seed)),
        accuracy_reward,
        64,
    ),
}
REMARKS = "_remarks"
"""With this ending, a truthful remark follows each sum in a task's recorded responses."""
TASKS["embedded" + REMARKS] = TASKS["embedded"]._replace(title="Embedded geometry task, with remarks")


def settings(**changes: Any) -> SAPOConfig:
    """The study's settings, where a critic reads them."""
    return SAPOConfig(
        **{**STUDY.settings, **changes},
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )


def record(task: Task, seed: int, cache_dir: Path, learned: int = LEARNED) -> dict[str, Any]:
    """
    Sample a seed's responses, and continue some of the held-out ones from the states that critics learn.

    Returns:
        `dict`: `learned` and `held_out`, the rows of two batches with `segment_ids` and `rewards`; `states`, bool
        `(N, T)`, the continued states of the second; `outcomes`, float32 `(states, continuations)`, their rewards.
    """
    folder = task.warm_start(cache_dir)
    args = settings(seed=seed, critic="shared", max_completion_length=task.longest_response)
    parts = [task.prompts(number, split, 1000 + seed) for number, split in ((learned, "train"), (HELD_OUT, "test"))]
    trainer = SAPOTrainer(
        AutoModelForImageTextToText.from_pretrained(folder),
        task.reward,
        args,
        parts[0],
        processing_class=embedded.load_processor(folder),
    )
    set_seed(1000 + seed)
    trainer.model.eval()
    recorded: dict[str, Any] = {}
    for name, part in zip(("learned", "held_out"), parts, strict=True):
        rows, numbers = list(part), list(range(len(part)))
        prompts = trainer.tokenized_prompts(rows)
        sampler = trainer.continuation_sampler(prompts, rows)
        ids = sampler.sample(numbers, [[]] * len(rows), [task.longest_response] * len(rows))
        batch = prompts.model_inputs(numbers, ids, trainer.tokenizer.pad_token_id, trainer.accelerator.device)
        with torch.no_grad():
            forward = trainer.policy_forward(trainer.model, batch, 64)
        batch["segment_ids"] = trainer.segment(forward, batch, batch["completion_mask"].bool()).ids
        batch["rewards"] = sampler.scores(numbers, ids)[:, 0]
        recorded[name] = merge_rows([batch])
    states = Segments(batch["segment_ids"]).state_mask("start").nonzero()
    chosen = states[torch.randperm(len(states))[:STATES]]
    recorded["states"] = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
    recorded["states"][tuple(chosen.T)] = True
    recorded["outcomes"] = sampler.values_at(recorded["states"], batch["completion_ids"], CONTINUATIONS).rewards
    return recorded


def with_remarks(recorded: dict[str, Any], processor: Any) -> dict[str, Any]:
    """A recording in which `!` follows each right sum and `?` each wrong one, within the same segments."""
    tokenizer = processor.tokenizer
    right, wrong = tokenizer.convert_tokens_to_ids(["!", "?"])
    changed = dict(recorded)
    for part in ("learned", "held_out"):
        batch, rows = recorded[part], []
        for ids in batch["completion_ids"].tolist():
            line, places = "", []  # the old place of each token, or a remark
            for place, token in enumerate(tokenizer.batch_decode([[token] for token in ids])):
                sums = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line) if "\n" in token else None
                if sums:
                    a, sign, b, result = sums.groups()
                    places.append((place - 1, right if int(a) + int(sign + b) == int(result) else wrong))
                places.append((place, ids[place]))
                line = "" if "\n" in token else line + token
            rows.append(places)
        longest = max(map(len, rows))
        filled = [row + [(row[-1][0], tokenizer.pad_token_id)] * (longest - len(row)) for row in rows]
        old = torch.tensor([[place for place, _ in row] for row in filled])
        is_new = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
        prompt = batch["prompt_ids"].size(1)
        changed[part] = {
            **batch,
            "completion_ids": torch.tensor([[token for _, token in row] for row in filled]),
            "completion_mask": batch["completion_mask"].gather(1, old) * is_new,
            "segment_ids": batch["segment_ids"].gather(1, old).masked_fill(~is_new, -1),
            "mm_token_type_ids": torch.nn.functional.pad(batch["mm_token_type_ids"][:, :prompt], (0, longest)),
        }
    # The state before a token now includes the remark before it.
    is_first = torch.ones_like(is_new)
    is_first[:, 1:] = old[:, 1:] != old[:, :-1]
    changed["states"] = recorded["states"].gather(1, old) & is_first & is_new
    return changed


class Lesson:
    """A seed's responses with the frozen policy's hidden states, to learn from and to be tested on."""

    def __init__(self, name: str, seed: int, cache_dir: Path, learned: int = LEARNED):
        task = TASKS[name]
        path = cache_dir / "critic_quality" / f"{name.removesuffix(REMARKS)}_{seed}_{learned}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(record(task, seed, cache_dir, learned), path)
        self.recorded = torch.load(path)
        self.folder = task.warm_start(cache_dir)
        if name.endswith(REMARKS):
            self.recorded = with_remarks(self.recorded, embedded.load_processor(self.folder))
        self.backbone = backbone_of(self.policy())
        self.states = {part: _hidden_states(self.backbone, self.recorded[part]) for part in ("learned", "held_out")}

    def policy(self) -> PreTrainedModel:
        """A copy of the policy."""
        return AutoModelForImageTextToText.from_pretrained(self.folder)

    def values(self, critic: SegmentValueHead, part: str, rows: list[int]) -> torch.Tensor:
        """float32 `(b, T)`: a critic's values of the states before each token of some responses."""
        batch = take_rows(self.recorded[part], rows)
        inputs = _model_inputs(batch)
        if critic.reads:
            read = (self.states[part][depth][rows] for depth in critic.depths(self.backbone))
            values = critic.values_of([critic.take(i, x) for i, x in enumerate(read)], inputs["attention_mask"])
        else:
            values = critic(**inputs)
        return values[:, -batch["completion_ids"].size(1) - 1 : -1]

    def test(self, critic: SegmentValueHead) -> dict[str, float]:
        """The two measures of a critic."""
        batch, outcomes = self.recorded["held_out"], self.recorded["outcomes"]
        with torch.no_grad():
            rows = torch.arange(len(batch["rewards"])).split(100)
            values = torch.cat([self.values(critic, "held_out", part.tolist()) for part in rows])
        states = Segments(batch["segment_ids"]).state_mask("start")
        error = (values[self.recorded["states"]] - outcomes.mean(dim=1)).square().mean()
        return {
            "explained_variance": float(explained_variance(values, returns_of(batch), states)),
            "squared_error": float(error - outcomes.var(dim=1).mean() / outcomes.size(1)),
        }

    def limit(self) -> dict[str, float]:
        """The two measures of the true values and of the best constant."""
        outcomes = self.recorded["outcomes"]
        within = outcomes.var(dim=1).mean()
        between = outcomes.mean(dim=1).var() - within / outcomes.size(1)
        return {
            "explained_variance": float(between / (between + within)),
            "squared_error": float(between),
            "accuracy": float(self.recorded["learned"]["rewards"].mean()),
        }


def _hidden_states(backbone: PreTrainedModel, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Float `(N, S, H)` of each depth, from the embeddings to the last state."""
    chunks = torch.arange(len(batch["rewards"])).split(64)
    with torch.no_grad():
        found = [
            backbone(**_model_inputs(take_rows(batch, rows.tolist())), output_hidden_states=True).hidden_states
            for rows in chunks
        ]
    return [torch.cat(states) for states in zip(*found, strict=True)]


def _model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    inputs = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in batch}
    for name, kind in (("input_ids", "ids"), ("attention_mask", "mask")):
        inputs[name] = torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1)
    return inputs


def returns_of(batch: dict[str, Any]) -> torch.Tensor:
    return batch["rewards"].unsqueeze(1).expand(batch["segment_ids"].shape)


@lru_cache(maxsize=1)
def lesson(task: str, seed: int, cache_dir: Path, learned: int = LEARNED) -> Lesson:
    """The lesson of a seed, with this many responses to learn from."""
    return Lesson(task, seed, cache_dir, learned)
