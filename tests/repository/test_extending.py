"""The example of `docs/extending.md`, run as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from sapo_trl import SAPOTrainer
from tests.testing_utils import Recorder, length_reward, sapo_config


BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
def test_the_example_does_what_it_says(family, tmp_path, monkeypatch):
    definition, _, use, _ = BLOCKS
    assert len(definition.splitlines()) < 40
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    names: dict = {}
    exec(definition, names)
    make_config, trainer_class = names["sentence_config"], names["SentenceTrainer"]
    tiny = {
        name: value
        for name, value in vars(sapo_config(tmp_path)).items()
        if name in ("per_device_train_batch_size", "max_steps", "use_cpu", "bf16", "report_to", "learning_rate")
    }
    names |= {
        "model": family.build_model(),
        "reward": length_reward,
        "dataset": family.dataset(),
        "processing_class": family.processing_class,
        "small": {},
        "sentence_config": lambda folder, **printed: make_config(
            folder, num_generations=2, max_completion_length=24, save_strategy="no", **tiny
        ),
        "SentenceTrainer": lambda **arguments: trainer_class(callbacks=[recorder], **arguments),
    }
    exec(use, names)

    rollout = recorder.rollouts[0]
    groups = rollout.rewards.view(-1, 2)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)
    counts = rollout.segments.count
    assert counts.max() > 1
    for row, count in enumerate(counts.tolist()):
        for segment in range(count):
            advantages = rollout.advantages[row][rollout.segments.ids[row] == segment]
            wanted = expected[row] * 0.9 ** (count - 1 - segment)
            torch.testing.assert_close(advantages, wanted.expand_as(advantages), rtol=0, atol=1e-5)
    texts = family.tokenizer.batch_decode(rollout.completion_ids[rollout.segments.is_last].unsqueeze(1))
    assert sum("." in text or "\n" in text for text in texts) >= len(texts) - len(counts)


def test_the_page_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2

    # The page's callback, beside one that keeps the rollouts.
    trainer.add_callback(recorder := Recorder())
    evaluation = trainer.evaluate(names["dataset"].select(range(8)))
    assert recorder.rollouts
    wrong = [rollout.segments.count[rollout.rewards < 1].float().mean().item() for rollout in recorder.rollouts]
    assert evaluation["eval_sentences/wrong"] == pytest.approx(sum(wrong) / len(wrong))
    counts = torch.cat([rollout.segments.count for rollout in recorder.rollouts])
    (callback,) = [each for each in trainer.callback_handler.callbacks if type(each).__name__ == "SentenceCounts"]
    restored = type(callback)()
    restored.load_state_dict(callback.state_dict())
    assert restored.most == callback.most >= counts.max()


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_values_without_measurements_are_an_error_that_says_so(family, tmp_path):
    class OldTrainer(SAPOTrainer):
        def estimate_values(self, forward, batch, segments, policy_mask, record):
            return torch.zeros_like(forward.logps)  # of two rows: it could be unpacked

    trainer = OldTrainer(
        family.build_model(),
        length_reward,
        sapo_config(tmp_path, per_device_train_batch_size=1, num_mini_batches=2, critic="none"),
        family.dataset(),
        processing_class=family.processing_class,
    )
    with pytest.raises(TypeError, match=r"`estimate_values` must return `\(values, metrics\)`.*got a Tensor"):
        trainer.train()
