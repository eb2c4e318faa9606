"""
Training with a real vLLM server. `make test-vllm` makes its environment and runs these.

A server that samples from other weights than those that are trained raises no error and stops no run. What tells is
the difference between the trainer's and the sampler's log-probabilities of the same tokens, so every test looks at it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from sapo_trl.generation import SamplerLostError, VLLMServerRollout, train_with_checkpoint
from sapo_trl.rollouts import TokenizedPrompts
from sapo_trl.trainer.trl.generation import collapsed
from tests.testing_utils import FAMILIES, Recorder, logged, sapo_trainer

from .servers import ENVIRONMENT, IN_SYNC, NEEDS_VLLM, build_text_model, running_server, save_for_vllm


pytestmark = NEEDS_VLLM

START_SECONDS = 800


class Sampled(Recorder):
    """
    The rollouts and what the sampler said about its tokens.

    Responses end before the first token in `barred`: a random model writes image placeholders, for which there are no
    images. (Forbidding them would change the sampler's log-probabilities.)
    """

    def __init__(self, rollout: VLLMServerRollout, barred: set[int] = frozenset()):
        super().__init__()
        self.rollout = rollout
        self.barred = barred
        self.outputs = []

    def __call__(self, prompts, trainer):
        return self.keep(self.rollout(prompts, trainer), trainer)

    def keep(self, output, trainer):
        for row, ids in enumerate(output["completion_ids"]):
            end = next((i for i, token in enumerate(ids) if token in self.barred), len(ids))
            output["completion_ids"][row] = ids[:end] or [trainer.eos_token_ids[0]]
            output["logprobs"][row] = output["logprobs"][row][:end] or [None]
        self.outputs.append(output)
        return output

    def differences(self) -> list[float]:
        """Mean absolute difference of the trainer's and the sampler's log-probabilities, of each rollout."""
        means = []
        for output, rollout in zip(self.outputs, self.rollouts, strict=True):
            pairs = zip(
                output["completion_ids"], output["logprobs"], rollout.logps, rollout.completion_ids, strict=True
            )
            gaps = []
            for ids, sampled, trained, trained_ids in pairs:
                assert trained_ids[: len(ids)].tolist() == ids
                sampled = torch.tensor([torch.nan if logp is None else logp for logp in sampled])
                gaps.append((sampled - trained[: len(ids)].cpu()).abs())
            means.append(torch.cat(gaps).nanmean().item())
        return means


class SampledAhead(Sampled, TrainerCallback):
    """The same one rollout ahead, with the prompts of each rollout and the weights of each step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prompts, self.weights = [], {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    on_step_end = on_train_begin

    def __call__(self, prompts, trainer):
        self.prompts.append(prompts)
        return super().__call__(prompts, trainer)

    def request(self, prompts, trainer, step):
        self.prompts.append(prompts)
        requested = self.rollout.request(prompts, trainer, step)
        collect = requested.collect
        requested.collect = lambda: self.keep(collect(), trainer)
        return requested

    def differences_of_age(self, trainer) -> list[float]:
        """As [`differences`], but from the weights that each rollout says it was sampled with."""
        means, pad = [], trainer.tokenizer.pad_token_id
        for prompts, output, rollout in zip(self.prompts, self.outputs, self.rollouts, strict=True):
            trainer.model.load_state_dict(self.weights[rollout.sampled_at])
            tokenized = TokenizedPrompts(*trainer._tokenize_prompts(prompts), trainer.placeholder_ids)
            batch = tokenized.model_inputs(list(range(len(prompts))), output["completion_ids"], pad, "cpu")
            with torch.no_grad():
                logps = trainer.policy_forward(trainer.model, batch).logps
            gaps = []
            for row, sampled in enumerate(output["logprobs"]):
                sampled = torch.tensor([torch.nan if logp is None else logp for logp in sampled])
                gaps.append((sampled - logps[row, : len(sampled)]).abs())
            means.append(torch.cat(gaps).nanmean().item())
        return means


class NeverAgain(VLLMServerRollout):
    """Sends the weights once, as a client that forgets the later steps."""

    def _sync_weights(self, trainer):
        if self.weights is None:
            super()._sync_weights(trainer)


def trainer_on(family, model, folder, sampled, callbacks=(), **overrides):
    settings = {"max_steps": 4, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    settings |= {"num_mini_batches": 1, "temperature": 0.8, "max_completion_length": 12}
    return sapo_trainer(
        family,
        folder,
        model=model,
        trainer_kwargs={"rollout_func": sampled, "callbacks": [sampled, *callbacks]},
        **settings | overrides,
    )


@pytest.fixture(scope="module")
def text_family(tokenizer):
    return FAMILIES["qwen2"](tokenizer)


@pytest.fixture(scope="module")
def text_folder(text_family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "text"
    return save_for_vllm(build_text_model(text_family), text_family.processing_class, folder)


@pytest.fixture(scope="module")
def text_server(text_folder):
    with running_server(text_folder) as server:
        yield server


def connect(server, folder, client=VLLMServerRollout, **settings):
    try:
        return client(server.url, folder, start_timeout=START_SECONDS, **settings)
    except SamplerLostError:
        pytest.fail(server.log[-3000:])


class TestText:
    def test_every_rollout_comes_from_the_weights_that_are_trained(self, text_family, text_server, tmp_path):
        sampled = Sampled(connect(text_server, tmp_path / "weights"))
        trainer = trainer_on(text_family, build_text_model(text_family), tmp_path, sampled)
        trainer.train()
        print("in sync:", sampled.differences())
        assert sampled.steps == [0, 1, 2, 3]
        assert max(sampled.differences()) < IN_SYNC
        completions = [str(output["completion_ids"]) for output in sampled.outputs]
        assert len(set(completions)) == len(completions)

        # What the server was sent is the policy and nothing of the critic.
        (folder,) = (tmp_path / "weights").iterdir()
        written = load_file(folder / "model.safetensors")
        policy = build_text_model(text_family).state_dict()
        assert written.keys() == policy.keys()
        assert trainer.critic is not None

    def test_without_sync_the_difference_shows_it(self, text_family, text_server, tmp_path):
        sampled = Sampled(connect(text_server, tmp_path / "weights", NeverAgain))
        trainer_on(text_family, build_text_model(text_family), tmp_path, sampled).train()
        differences = sampled.differences()
        print("never again:", differences)
        assert differences[0] < IN_SYNC
        assert min(differences[1:]) > 20 * IN_SYNC

    def test_the_same_seed_gives_the_same_run(self, text_family, text_server, tmp_path):
        runs = []
        for name in ("first", "second"):
            sampled = Sampled(connect(text_server, tmp_path / name))
            trainer_on(text_family, build_text_model(text_family), tmp_path, sampled, max_steps=2).train()
            runs.append([output["completion_ids"] for output in sampled.outputs])
        assert runs[0] == runs[1]


class Kill(TrainerCallback):
    def __init__(self, server, step: int):
        self.server, self.step = server, step
        self.at = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.server.kill()
            self.at = time.monotonic()


class TestLoss:
    def test_a_killed_server_ends_the_run_with_a_checkpoint_to_resume_from(self, text_family, text_folder, tmp_path):
        with running_server(text_folder) as server:
            sampled = Sampled(connect(server, tmp_path / "weights", retries=2, backoff=0.5))
            kill = Kill(server, step=2)
            trainer = trainer_on(text_family, build_text_model(text_family), tmp_path, sampled, [kill])
            with pytest.raises(SamplerLostError, match="resume_from_checkpoint"):
                train_with_checkpoint(trainer)
            seconds = time.monotonic() - kill.at
            print(f"lost after {seconds:.1f} s")
            assert seconds < 30
            assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")

            # Started again it has its first weights, under their name; the resumed run sends the present ones.
            server.start()
            sampled = Sampled(connect(server, tmp_path / "weights"))
            trainer = trainer_on(text_family, build_text_model(text_family), tmp_path, sampled)
            train_with_checkpoint(trainer, resume_from_checkpoint=True)
            print("resumed:", sampled.differences())
            assert sampled.steps == [2, 3]
            assert max(sampled.differences()) < IN_SYNC


class TestImages:
    def test_the_server_sees_the_prompts_and_weights_that_are_trained(self, qwen2_5_vl_processor, tmp_path):
        """The vision tower too, with pictures that come back after it has been trained."""
        family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
        folder = save_for_vllm(family.build_model(), family.processing_class, tmp_path / "model")
        with running_server(folder) as server:
            barred = family.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
            sampled = Sampled(connect(server, tmp_path / "weights"), set(barred))
            trainer = trainer_on(family, family.build_model(), tmp_path, sampled, max_steps=6)
            trainer.train()
            print("images:", sampled.differences())
            assert max(sampled.differences()) < IN_SYNC

    def test_one_rollout_ahead(self, qwen2_5_vl_processor, tmp_path):
        """Each rollout comes from the weights that it names, which are those before the last update."""
        family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
        folder = save_for_vllm(family.build_model(), family.processing_class, tmp_path / "model")
        with running_server(folder) as server:
            barred = family.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
            sampled = SampledAhead(connect(server, tmp_path / "weights"), set(barred))
            trainer = trainer_on(family, family.build_model(), tmp_path, sampled, max_steps=5, rollouts_ahead=1)
            trainer.train()
        assert logged(trainer, "sampling/age") == [0, 1, 1, 1, 1]
        assert [rollout.sampled_at for rollout in sampled.rollouts] == [0, 0, 1, 2, 3]
        of_age, of_present = sampled.differences_of_age(trainer), sampled.differences()
        print("one ahead:", of_age, "with the present weights:", of_present)
        assert max(of_age) < IN_SYNC
        assert of_present[0] < IN_SYNC and min(of_present[1:]) > 20 * IN_SYNC


class TestColocatedEngine:
    @pytest.mark.parametrize("is_collapsed", [True, False])
    def test_it_answers_the_prompts_that_are_trained_on(self, is_collapsed, qwen2_5_vl_processor, tmp_path):
        """
        An engine gets prompts whose runs of image placeholders are collapsed, and makes the trained prompts of them:
        the same token ids, and transformers' greedy tokens with their log-probabilities. Of expanded ones, which TRL
        1.16 hands over, it makes others.
        """
        family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
        model = family.build_model()
        save_for_vllm(model, family.processing_class, tmp_path / "model")
        trainer = sapo_trainer(family, tmp_path, model=model)
        rows = list(trainer.train_dataset.select(range(3)))
        prompts = trainer.tokenized_prompts(rows)
        token_ids = prompts.ids
        if is_collapsed:
            token_ids = [collapsed(ids, trainer.processing_class.image_token_id) for ids in token_ids]
        requests = []
        for row, (ids, images) in enumerate(zip(token_ids, prompts.images, strict=True)):
            names = [f"{row}-{index}.png" for index in range(len(images))]
            for name, image in zip(names, images, strict=True):
                image.save(tmp_path / name)
            requests.append({"prompt_ids": ids, "images": names})
        assert any(request["images"] for request in requests)
        (tmp_path / "requests.json").write_text(json.dumps(requests))
        script = Path(__file__).with_name("engine.py")
        result = subprocess.run(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **ENVIRONMENT},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        answers = json.loads((tmp_path / "answers.json").read_text())
        if not is_collapsed:
            assert [answer["prompt_ids"] for answer in answers] != prompts.ids
            return
        for row, answer in enumerate(answers):
            assert answer["prompt_ids"] == prompts.ids[row]
            batch = prompts.model_inputs([row], [answer["token_ids"]], trainer.tokenizer.pad_token_id, "cpu")
            with torch.no_grad():
                logps = trainer.policy_forward(trainer.model, batch).logps[0]
                logits = model(**logits_inputs(batch)).logits[0, -len(answer["token_ids"]) - 1 : -1]
            assert logits.argmax(-1).tolist() == answer["token_ids"]
            torch.testing.assert_close(logps, torch.tensor(answer["logps"]), rtol=0, atol=IN_SYNC)


def logits_inputs(batch):
    """A rollout's batch as the model's forward takes it."""
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    inputs["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return inputs
