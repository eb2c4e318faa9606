"""A short run for `test_vllm_client.py` to launch in two processes; each writes what it saw."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState

from sapo_trl.embedded import build_tokenizer
from sapo_trl.generation import SamplerError, VLLMServerRollout
from tests.testing_utils import FAMILIES, Recorder, sapo_trainer


class Kept(Recorder):
    def __init__(self, rollout, lose_on_rank):
        super().__init__()
        self.rollout, self.lose_on_rank = rollout, lose_on_rank
        self.outputs = []

    def request(self, prompts, trainer, step):
        self.maybe_lose(trainer)
        return self.rollout.request(prompts, trainer, step)

    def __call__(self, prompts, trainer):
        self.maybe_lose(trainer)
        self.outputs.append(self.rollout(prompts, trainer))
        return self.outputs[-1]

    def maybe_lose(self, trainer):
        if trainer.state.global_step == 1 and trainer.accelerator.process_index == self.lose_on_rank:
            # A network that fails for one of the two: nothing listens there.
            self.rollout.client.base_url = "http://127.0.0.1:9"

    def gaps(self) -> list[float]:
        """Largest differences of the trainer's and the sampler's log-probabilities."""
        gaps = []
        for output, rollout in zip(self.outputs, self.rollouts, strict=True):
            rows = enumerate(output["logprobs"])
            gaps.append(max((rollout.logps[i, : len(r)] - torch.tensor(r)).abs().max().item() for i, r in rows))
        return gaps


def prompts_of(rollout) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]


def main(url: str, folder: Path, lose_on_rank: int | None, ahead: int, learning_rate: float) -> None:
    kept = Kept(VLLMServerRollout(url, folder / "weights", retries=1, backoff=0.1), lose_on_rank)
    trainer = sapo_trainer(
        FAMILIES["qwen2"](build_tokenizer()),
        folder,
        trainer_kwargs={"rollout_func": kept, "callbacks": [kept]},
        max_steps=3,
        num_generations=2,
        per_device_train_batch_size=2,
        num_mini_batches=1,
        learning_rate=learning_rate,
        rollouts_ahead=ahead,
    )
    report = {"world_size": trainer.accelerator.num_processes}
    try:
        trainer.train()
        if ahead:
            report |= {"sampled_at": [rollout.sampled_at for rollout in kept.rollouts]}
        else:
            report |= {"gaps": kept.gaps(), "completion_ids": [output["completion_ids"] for output in kept.outputs]}
        report |= {"prompts": [prompts_of(rollout) for rollout in kept.rollouts]}
        report |= {"tokens": [rollout.completion_ids.tolist() for rollout in kept.rollouts]}
    except SamplerError as error:
        report |= {"error": type(error).__name__, "message": str(error)}
        raise
    finally:
        (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lose-on-rank", type=int)
    parser.add_argument("--ahead", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    main(*vars(parser.parse_args()).values())
    PartialState().destroy_process_group()
