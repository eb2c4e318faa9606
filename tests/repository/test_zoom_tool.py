"""`examples/zoom_tool.py`: a tool's pictures reach the policy and the critic, and its tokens teach nothing."""

import copy

import pytest
import torch
from PIL import Image

from examples import zoom_tool as example
from sapo_trl import SAPOTrainer
from sapo_trl.embedded import build_model
from tests.testing_utils import Recorder, logged, script_generation, state_of, unmoved


END = "<|im_end|>"
# Four responses, turn by turn: one call; two calls; none; a call of a side that does not exist.
SIDES = [["DA"], ["AB", "CD"], [], ["XY"]]
ANSWERS = ["\\boxed{3}", "\\boxed{4}", "\\boxed{5}", "\\boxed{6}"]


def said() -> list[list[str]]:
    """The texts of each turn, of the responses that are still going on."""
    turns = []
    for turn in range(3):
        going_on = [row for row in range(4) if turn <= len(SIDES[row])]
        calls = [example.call_of(SIDES[row][turn]) if turn < len(SIDES[row]) else ANSWERS[row] for row in going_on]
        turns.append([call + END for call in calls])
    return turns


@pytest.fixture
def processor():
    return example.make_processor()


@pytest.fixture
def rows():
    rows = example.make_rows(4).remove_columns(["side", "answer"])
    # The right side and length of the first response alone are known.
    return rows.add_column("side", ["DA", "BC", "BC", "AB"]).add_column("answer", ["3", "1", "5", "1"])


def scripted(processor, rows, tmp_path, **settings) -> tuple[SAPOTrainer, Recorder, list]:
    trainer = example.make_trainer(
        build_model(processor.tokenizer),
        processor,
        rows,
        str(tmp_path),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_mini_batches": 2,
            "max_completion_length": 400,
            "max_steps": 2,
            "logging_steps": 1,
            "beta": 0.0,
            "learning_rate": 0.01,
            "shuffle_dataset": False,
            "report_to": "none",
            **settings,
        },
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    return trainer, recorder, script_generation(trainer, said())


def inputs_of(processor, rollout, row: int, pictures: list[Image.Image]) -> tuple[dict, int]:
    """One response with its prompt and its pictures, without any padding; and the prompt's length."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
    completion = rollout.completion_ids[row][rollout.completion_mask[row].bool()]
    ids = torch.cat([prompt, completion])[None]
    images = processor.image_processor(images=pictures, return_tensors="pt")
    types = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **images}, len(
        prompt
    )


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_later_pictures_reach_policy_and_critic(processor, rows, critic, tmp_path):
    trainer, recorder, turns = scripted(processor, rows, tmp_path, critic=critic)
    policy = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
    policy.forward = type(policy).forward.__get__(policy)  # without TRL's fused head
    critic_module = copy.deepcopy(trainer.critic.module)
    before, critic_before = state_of(trainer.model), state_of(trainer.critic.module)
    trainer.train()
    (rollout,) = recorder.rollouts

    turn_ids = [[0, 0], [1, 1, 0], [2], [3, 2]]  # the place of each response in each turn
    assert logged(trainer, "tools/failure_frequency")[0] == pytest.approx(1 / 4)
    for row in range(4):
        mask = rollout.segments.mask[row]
        own = sum((turns[turn][place] for turn, place in enumerate(turn_ids[row])), [])
        # Only the policy's own words are in segments.
        assert rollout.completion_ids[row][mask].tolist() == own
        drawing = rows[row]["images"][0]
        pictures = [drawing, *(example.enlarged(drawing, side) for side in SIDES[row] if side != "XY")]

        def read(pictures, row=row):
            inputs, start = inputs_of(processor, rollout, row, pictures)
            with torch.no_grad():
                outputs = policy(**inputs, output_hidden_states=True)
                states = {"hidden_states": outputs.hidden_states[-1]} if critic == "shared" else inputs
                values = critic_module(**states)[0, start - 1 : -1]
            logps = outputs.logits[0].float().log_softmax(-1)[:-1].gather(1, inputs["input_ids"][0, 1:, None])
            return logps[start - 1 :, 0], values

        length = int(rollout.completion_mask[row].sum())
        own_tokens = mask[:length]
        logps, values = read(pictures)
        torch.testing.assert_close(rollout.logps[row, :length][own_tokens], logps[own_tokens], rtol=0, atol=1e-4)
        torch.testing.assert_close(rollout.values[row, :length][own_tokens], values[own_tokens], rtol=0, atol=1e-4)
        if len(pictures) > 1:
            # With another last picture, the turns before it stay as they are. The turn after it does not.
            others = read([*pictures[:-1], Image.new("RGB", drawing.size, "grey")])
            last = torch.zeros_like(own_tokens)
            last[own_tokens.nonzero()[-len(turns[len(turn_ids[row]) - 1][turn_ids[row][-1]]) :]] = True
            for found, other in zip((logps, values), others, strict=True):
                torch.testing.assert_close(other[own_tokens & ~last], found[own_tokens & ~last], rtol=0, atol=1e-5)
                assert (other - found)[own_tokens & last].abs().max() > 1e-2
    assert unmoved(before, trainer.model) == [] and unmoved(critic_before, trainer.critic.module) == []


def test_rewards_fall_due_in_their_turns(processor, rows, tmp_path):
    trainer, recorder, turns = scripted(processor, rows, tmp_path, critic="none", lam=1.0, segmentation="token")
    trainer.train()
    (rollout,) = recorder.rollouts
    assert rollout.rewards.tolist() == [1.5, 0.0, 1.0, 0.0]
    first = rollout.token_rewards[0][rollout.segments.mask[0]]
    call = len(turns[0][0])
    assert first.nonzero().flatten().tolist() == [call - 1, len(first) - 1]
    assert first[call - 1] == 0.5 and first[-1] == 1.0
    assert rollout.returns[0, 0] == 1.5 and rollout.returns[0][rollout.segments.mask[0]][-1] == 1.0


def test_a_video_token_in_a_turn(processor, rows, tmp_path):
    """It is a token like any other: nobody looks for its frames, while sampling or after."""
    trainer, recorder, _ = scripted(
        processor, rows, tmp_path, max_steps=1, num_mini_batches=1, per_device_train_batch_size=4
    )
    turns = said()
    turns[0][0] = "<|video_pad|>" + turns[0][0]
    turns[1][1] = "<|video_pad|>" + turns[1][1]
    script_generation(trainer, turns)
    trainer.train()
    video = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    (rollout,) = recorder.rollouts
    assert (rollout.completion_ids[rollout.segments.mask] == video).sum() == 2
    assert rollout.logps[rollout.segments.mask].isfinite().all()


def test_a_template_that_drops_the_pictures_of_tools(processor, rows, tmp_path):
    before, tool = processor.chat_template.split('{%- elif message.role == "tool" %}')
    template = f'{before}{{%- elif message.role == "tool" %}}{tool.replace("<|image_pad|>", "", 1)}'
    processor.chat_template = processor.tokenizer.chat_template = template
    trainer, _, _ = scripted(processor, rows, tmp_path)
    with pytest.raises(ValueError, match="Found total 0 .*image_pad.* tokens and 1 images"):
        trainer.train()


@pytest.mark.parametrize("critic", ["monte_carlo", "tree"])
def test_critics_that_continue_responses_refuse_an_environment(processor, rows, critic, tmp_path):
    settings = {"segmentation": "sequence", "num_generations": 2} if critic == "tree" else {}
    with pytest.raises(ValueError, match=f"`critic='{critic}'` continues .* `environment_factory` decides"):
        scripted(processor, rows, tmp_path, critic=critic, **settings)


def test_every_side_is_enlarged():
    problem = example.sample_problems(1)[0]
    drawing = example.make_rows(1)[0]["images"][0]
    crops = [example.enlarged(drawing, side) for side in example.SIDES]
    assert len(problem.lengths) == 4 and len({crop.tobytes() for crop in crops}) == 4
    assert all(crop.size == drawing.size for crop in crops)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    trainer = example.train(example.Config(imitation_steps=40, num_steps=1, output_dir=str(tmp_path)))
    assert min(logged(trainer, "tools/call_frequency")) > 0.2
    assert 0 < logged(trainer, "rewards/zoom_reward/placed")[0] < 0.5
