"""Rewards with places in the text: the class, its errors, and the tokens that they belong to."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema, parse_response, qwen3_chat_template

from sapo_trl.embedded import build_tokenizer
from sapo_trl.rewards.steps import Step, StepReward, StepRewards, check_steps


TOKENIZER = build_tokenizer()
SPECIAL = TOKENIZER.convert_tokens_to_ids("<|quad_start|>")
END = TOKENIZER.eos_token_id


class TestStepReward:
    REWARD = StepReward([(0, 3, 0.25), (3, None, -1.0, 0)], final=2.0)

    def test_it_is_its_sum(self):
        assert self.REWARD == 1.25 and isinstance(self.REWARD, float)
        assert torch.tensor([self.REWARD, 1.0]).tolist() == [1.25, 1.0]
        assert self.REWARD.steps == (Step(0, 3, 0.25, -1), Step(3, None, -1.0, 0)) and self.REWARD.final == 2.0

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))])
    def test_copies_keep_the_places(self, duplicate):
        again = duplicate(self.REWARD)
        assert again == 1.25 and again.steps == self.REWARD.steps and again.final == 2.0

    def test_nan_anywhere_is_no_reward(self):
        assert math.isnan(StepReward([(0, 1, math.nan)], final=1.0))


class TestErrors:
    @pytest.mark.parametrize("span", [(3, 3), (-1, 2), (2, 6), (6, None), (4, 2)])
    def test_spans_outside_the_text(self, span):
        with pytest.raises(ValueError, match=rf"`mine`, completion 1 of 2: the span \({span[0]}, {span[1]}, .*<= 5"):
            check_steps("mine", [1.0, StepReward([(*span, 1.0)])], ["", "hello"])

    def test_messages(self):
        completion = [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "hello"}]
        check_steps("mine", [StepReward([(0, 5, 1.0), (0, None, 1.0, 0), (0, 5, 1.0, 1)])], [completion])
        with pytest.raises(ValueError, match="`mine`, completion 0 of 1.*names message 2, but the completion has 2"):
            check_steps("mine", [StepReward([(0, 1, 1.0, 2)])], [completion])
        with pytest.raises(ValueError, match="0 <= start < end <= 0"):
            check_steps("mine", [StepReward([(0, 1, 1.0, -2)])], [completion])

    def test_offsets_are_integers(self):
        with pytest.raises(TypeError, match="float"):
            check_steps("mine", [StepReward([(0, 1.5, 1.0)])], ["hello"])


def places(reward: StepReward, completion, ids: list[int], sampled=None, prompt=(), tokenizer=TOKENIZER) -> list[int]:
    kept = StepRewards({0: [reward]}, [completion], [ids])
    sampled = [True] * len(ids) if sampled is None else sampled
    return [place.position for place in kept.placed(tokenizer, [list(prompt)], [sampled])]


def byte_tokens(text: str) -> list[int]:
    """A token for each byte: characters beyond ASCII are split."""
    alphabet = TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return [TOKENIZER.convert_tokens_to_ids(byte) for word, _ in alphabet(text) for byte in word]


@st.composite
def tokenized(draw):
    """Token ids of a text, and for each of them how many bytes of the text it ends at."""
    ids, ends, size = [], [], 0
    # Split characters, whole words of the task, and special tokens, in any order.
    kinds = st.one_of(st.just(None), st.sampled_from(["AB=7", "\n", "Find AB-BC."]), st.text("aé€𝄞 \n�", min_size=1))
    text = ""
    for piece in draw(st.lists(kinds, min_size=1, max_size=6)):
        if piece is None:
            ids.append(SPECIAL)
            ends.append(size)
            continue
        text += piece
        new = TOKENIZER.encode(piece) if piece.isascii() else byte_tokens(piece)
        for token in new:
            # The vocabulary writes each byte as one character.
            size += len(TOKENIZER.convert_ids_to_tokens(token))
            ids.append(token)
            ends.append(size)
    return text, ids, ends


@settings(max_examples=200)
@given(tokenized(), st.data())
def test_a_step_ends_on_the_token_with_the_last_byte_of_its_span(case, data):
    text, ids, ends = case
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    if not text:
        return
    end = data.draw(st.integers(1, len(text)))
    size = len(text[:end].encode())
    expected = next(position for position, covered in enumerate(ends) if covered >= size)
    (found,) = places(StepReward([(0, end, 1.0)]), text, ids)
    if "�" in text[:end] and found != expected:
        # Bytes that are still incomplete look like this character.
        assert expected - 2 <= found < expected
    else:
        assert found == expected
    (found,) = places(StepReward([(0, end, 1.0)]), [{"role": "assistant", "content": text}], ids)
    assert found <= expected


def test_the_end_of_a_message_is_its_last_token():
    ids = TOKENIZER.encode("AB=7") + [SPECIAL, END]
    assert places(StepReward([(0, None, 1.0)]), "AB=7", ids) == [len(ids) - 1]
    assert places(StepReward([(0, 4, 1.0)]), "AB=7", ids) == [len(ids) - 3]


def test_text_that_the_policy_did_not_write_rewards_the_last_token_before_it():
    first, heard, second = (TOKENIZER.encode(text) for text in ("AB=7", "Find AB.", "7"))
    ids, text = first + heard + second, "AB=7Find AB.7"
    sampled = [True] * len(first) + [False] * len(heard) + [True] * len(second)
    assert places(StepReward([(4, 12, 1.0)]), text, ids, sampled) == [len(first) - 1]
    assert places(StepReward([(5, 13, 1.0)]), text, ids, sampled) == [len(ids) - 1]
    # There is nothing before it: the first token that the policy wrote.
    sampled = [False] * len(first) + [True] * (len(ids) - len(first))
    assert places(StepReward([(0, 1, 1.0)]), text, ids, sampled) == [len(first)]
    assert places(StepReward([(0, 1, 1.0)]), text, ids, [False] * len(ids)) == []


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    return add_response_schema(tokenizer)


class TestParsedMessages:
    """With a parser, a message's text is a part of the decoded tokens."""

    PROMPT = "<|im_start|>assistant\n"
    CALL = '<tool_call>\n{"name": "look", "arguments": {"at": 4}}\n</tool_call>'

    def read(self, tokenizer, text: str):
        prompt, ids = tokenizer.encode(self.PROMPT), tokenizer.encode(text)
        return prompt, ids, parse_response(tokenizer, ids, prefix=prompt)

    def until(self, tokenizer, ids: list[int], text: str) -> int:
        """The first token with which the text is written, by decoding ever more tokens."""
        return next(n for n in range(len(ids)) if text in tokenizer.decode(ids[: n + 1]))

    @pytest.mark.parametrize(
        "text",
        [
            "<think>\nAB=4, so 4\n</think>\n\n4<|im_end|>",
            f"<think>\nlook at 4\n</think>\n\n4\n{CALL}<|im_end|>",
            "<think>\nt or k\n</think>\n\nt<|im_end|>",
            f"<think>\nt or k\n</think>\n\nt\n{CALL}<|im_end|>",
            "<think>\nno\n</think>\n\nthe answer is 4, I think 4<|im_end|>",
        ],
    )
    def test_content_that_also_occurs_elsewhere(self, tokenizer, text):
        prompt, ids, message = self.read(tokenizer, text)
        content = message["content"]
        assert content and ("tool_calls" in message) == ("tool_call" in text)
        before = text[: text.index("</think>\n\n") + len("</think>\n\n")]
        for end in {1, len(content)}:
            (found,) = places(StepReward([(0, end, 1.0)]), [message], ids, prompt=prompt, tokenizer=tokenizer)
            assert found == self.until(tokenizer, ids, before + content[:end])

    def test_turns(self, tokenizer):
        said = ["<think>\n4\n</think>\n\nhm 4\n" + self.CALL + "<|im_end|>", "4 it is<|im_end|>"]
        heard = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer.encode(self.PROMPT)
        turns = [tokenizer.encode(text) for text in (said[0], heard, said[1])]
        ids = sum(turns, [])
        sampled = [True] * len(turns[0]) + [False] * len(turns[1]) + [True] * len(turns[2])
        first = parse_response(tokenizer, turns[0], prefix=prompt)
        last = parse_response(tokenizer, turns[2], prefix=prompt + turns[0] + turns[1])
        completion = [first, {"role": "tool", "name": "look", "content": "4"}, last]
        assert first["content"] == "hm 4" and last["content"] == "4 it is"
        steps = [(0, 4, 1.0, 0), (0, None, 1.0, 0), (0, 1, 1.0, 1), (0, 1, 1.0), (0, None, 1.0, 2)]
        found = places(StepReward(steps), completion, ids, sampled, prompt, tokenizer)
        second = len(turns[0]) + len(turns[1])
        content = self.until(tokenizer, turns[0], "</think>\n\nhm 4")
        assert found == [content, len(turns[0]) - 1, len(turns[0]) - 1, second, len(ids) - 1]

    def test_a_text_that_is_not_in_the_tokens(self, tokenizer, caplog):
        ids = tokenizer.encode("one<|im_end|>")
        assert places(StepReward([(0, 1, 1.0)]), [{"role": "assistant", "content": "two"}], ids) == [len(ids) - 1]
        assert "was not found in its tokens" in caplog.text
