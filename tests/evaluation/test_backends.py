"""Generation: the right distribution, the same text in any batch, images where they belong."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.data import geometry_prompt, to_prompts
from sapo_trl.embedded import build_model, load_processor, make_problems
from sapo_trl.embedded.evaluation import encode_prompts
from sapo_trl.evaluation.backends import Request, make_backend
from sapo_trl.evaluation.backends.transformers import SeededChoice, TransformersBackend, row_uniforms
from sapo_trl.evaluation.benchmark import Score
from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.evaluation.settings import EvalArguments
from sapo_trl.evaluation.training import benchmark_dataset, benchmark_reward
from sapo_trl.rewards import accuracy_reward
from tests.evaluation.evaluation_run import DRAWN, TEXT
from tests.testing_utils import FAMILIES


def text_request(text="Find AB.", seed=0):
    return Request([{"role": "user", "content": text}], seed)


def drawn_request(row, seed=0):
    prompt = geometry_prompt(row)
    return Request(prompt["prompt"], seed, prompt["images"])


def backend(folder, **settings):
    settings = {"max_new_tokens": 12, "dtype": "float32", "temperature": 1.0, "top_p": 0.9, **settings}
    return TransformersBackend(EvalArguments(model=str(folder), **settings))


@pytest.fixture(scope="module")
def vlm_folder(qwen2_5_vl_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    build_model(qwen2_5_vl_processor.tokenizer).save_pretrained(folder)
    qwen2_5_vl_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    FAMILIES["qwen2"](tokenizer).build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ sampling


def test_choices_follow_the_warped_distribution():
    """20,000 rows of the same logits against the probabilities of temperature and top-p, written out."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    rows = 20_000
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.95)])
    processors.append(SeededChoice(row_uniforms(range(rows), 1), prompt_length=5))
    scores = processors(torch.zeros(rows, 5, dtype=torch.long), logits.repeat(rows, 1))
    assert ((scores > -torch.inf).sum(dim=1) == 1).all()
    counts = np.bincount(scores.argmax(dim=1).numpy(), minlength=12)

    probabilities = np.exp(logits.double().numpy() / 0.6)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    nucleus = order[: np.searchsorted(np.cumsum(probabilities[order]), 0.95) + 1]
    expected = np.zeros(12)
    expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    assert counts[expected == 0].sum() == 0 and (expected == 0).any()
    assert stats.chisquare(counts[nucleus], rows * expected[nucleus]).pvalue > 0.001


def test_each_step_has_a_number_of_its_own():
    uniforms = row_uniforms([1, 2, 1], 50)
    assert torch.equal(uniforms[0], uniforms[2]) and not torch.equal(uniforms[0], uniforms[1])
    assert len(set(uniforms[0].tolist())) == 50
    choose = SeededChoice(uniforms, prompt_length=3)
    flat = torch.zeros(3, 100)
    tokens = [choose(torch.zeros(3, 3 + step, dtype=torch.long), flat).argmax(dim=1)[0].item() for step in range(50)]
    assert tokens == [int(100 * u) for u in uniforms[0].tolist()]


def test_a_token_without_probability_is_never_chosen():
    choose = SeededChoice(torch.tensor([[0.0], [1 - 2**-24]], dtype=torch.float64), prompt_length=0)
    logits = torch.tensor([-torch.inf, 0.0, -30.0, -torch.inf]).repeat(2, 1)
    assert choose(torch.zeros(2, 0, dtype=torch.long), logits).argmax(dim=1).tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_generation_is_the_same_alone_and_in_any_batch(vlm_folder):
    """Pictures or none, prompts of several lengths: each row has its own, whatever lies beside it."""
    rows = list(make_problems(4, split="test"))
    requests = [drawn_request(row, seed) for seed, row in enumerate(rows)]
    requests.insert(1, text_request("Find AB+BC-CD+DA. " * 3, seed=17))
    generator = backend(vlm_folder)
    together = generator.generate(requests)
    assert len({generation.text for generation in together}) == len(together)
    assert [generator.generate([request])[0] for request in requests] == together
    assert generator.generate(requests[::-1]) == together[::-1]
    assert generator.generate([drawn_request(rows[0], seed=99)])[0] != together[0]


def test_greedy_decoding_is_that_of_generate(vlm_folder):
    rows = list(make_problems(3, split="test"))
    generator = backend(vlm_folder, temperature=0.0)
    found = generator.generate([drawn_request(row) for row in rows])
    processor = load_processor(vlm_folder)
    inputs = encode_prompts(processor, rows)
    sequences = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    completions = sequences[:, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    assert [generation.text for generation in found] == expected
    assert [generation.tokens for generation in found] == [12] * 3


def test_the_end_of_a_generation(text_folder):
    generator = backend(text_folder)
    end, pad = generator.tokenizer.eos_token_id, generator.tokenizer.pad_token_id
    letters = generator.tokenizer("AB=7")["input_ids"]
    finished = generator._read([*letters, end, pad, pad])
    assert (finished.text, finished.tokens, finished.finish_reason) == ("AB=7", len(letters) + 1, "stop")
    cut = generator._read(letters)
    assert (cut.tokens, cut.finish_reason) == (len(letters), "length")


def test_a_checkpoints_own_sampling_settings_do_not_count(text_folder, tmp_path):
    """A repetition penalty of 5 in the checkpoint would change nearly every token."""
    model = AutoModelForCausalLM.from_pretrained(text_folder)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1, no_repeat_ngram_size=1)
    model.save_pretrained(tmp_path)
    load_processor(text_folder).save_pretrained(tmp_path)
    requests = [text_request(seed=seed) for seed in range(4)]
    assert backend(tmp_path).generate(requests) == backend(text_folder).generate(requests)


def test_models_without_a_chat_template_continue_text(text_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(text_folder).save_pretrained(tmp_path)
    tokenizer = load_processor(text_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    generator = backend(tmp_path)
    request = Request([{"role": "user", "content": [{"type": "text", "text": "Find AB."}]}], 0)
    ids = generator._encode([request])["input_ids"][0]
    assert generator.tokenizer.decode(ids) == "Find AB.\n\n"
    assert len(generator.generate([request])) == 1


def test_a_text_model_gets_no_images(text_folder):
    with pytest.raises(ValueError, match="a prompt has images, but `model` is a text model"):
        backend(text_folder).generate([drawn_request(make_problems(1)[0])])


def test_an_adapter_changes_what_is_generated(text_folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(text_folder), LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    requests = [text_request(seed=seed) for seed in range(3)]
    assert backend(text_folder, adapter=str(tmp_path)).generate(requests) != backend(text_folder).generate(requests)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sapo_trl\[vllm\]'"):
        make_backend(EvalArguments(model="m", backend="vllm"))


# ------------------------------------------------------------------------------------------------------ while training


def test_a_benchmark_as_a_dataset_of_trl(tmp_path):
    make_problems(3, split="test").to_parquet(tmp_path / "rows.parquet")
    dataset = benchmark_dataset(DRAWN, str(tmp_path / "rows.parquet"), limit=2)
    assert len(dataset) == 2
    row = dataset[1]
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    assert row["images"][0].size == (56, 56)
    assert (row["benchmark"], row["problem_id"], row["fields"]) == ("drawn", "drawn-1", {"pair": 0})
    (tmp_path / "text.jsonl").write_text('{"name": "q", "question": "1 + 1?", "answer": "2"}\n')
    text = benchmark_dataset(TEXT, str(tmp_path / "text.jsonl"))
    assert text.column_names == ["prompt", "answer", "benchmark", "problem_id", "fields"]
    assert text[0]["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]


def test_the_reward_is_the_benchmarks_score():
    reward = benchmark_reward(DRAWN)
    assert reward.__name__ == "drawn_score"
    columns = {"benchmark": ["drawn", "drawn", "text"], "problem_id": ["a", "b", "c"], "fields": [{}] * 3}
    completions = [[{"role": "assistant", "content": r"\boxed{4}"}], r"\boxed{5}", r"\boxed{4}"]
    assert reward(completions=completions, answer=["4"] * 3, **columns) == [1.0, 0.0, None]
    assert reward(completions=["x"], answer=["4"]) == [None]


@pytest.mark.slow
def test_trl_evaluates_a_benchmark_while_it_trains(vlm_folder, tmp_path):
    """Evaluated by TRL's own trainer; the logged mean is that of what the scorer was shown."""
    make_problems(4, split="test").to_parquet(tmp_path / "rows.parquet")
    dataset = benchmark_dataset(DRAWN, str(tmp_path / "rows.parquet"))
    shown = []

    def length_score(problem, text):
        shown.append((problem.id, problem.answer, problem.fields))
        return Score((len(text) % 4) / 4, None)

    trainer = GRPOTrainer(
        str(vlm_folder),
        benchmark_reward(replace(DRAWN, score=length_score)),
        GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            num_generations=2,
            num_generations_eval=1,
            max_completion_length=6,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=load_processor(vlm_folder),
    )
    metrics = trainer.evaluate()
    assert {entry[0] for entry in shown} == {f"drawn-{i}" for i in range(4)}
    expected = {row["problem_id"]: (row["answer"], row["fields"]) for row in dataset}
    assert all(expected[problem_id] == (answer, fields) for problem_id, answer, fields in shown)
    assert 0.0 <= metrics["eval_rewards/drawn_score/mean"] <= 0.75


@pytest.mark.slow
def test_sapo_evaluates_a_benchmark_while_it_trains(vlm_folder, tmp_path):
    """As the documentation has it: the scorer beside the reward, with a weight of 0, on rows of another data set."""
    make_problems(4, split="test").to_parquet(tmp_path / "rows.parquet")
    scores = []

    def length_score(problem, text):
        scores.append((len(text) % 4) / 4)
        return Score(scores[-1], None)

    geo3k = replace(BENCHMARKS["geo3k"], score=length_score)
    trainer = SAPOTrainer(
        str(vlm_folder),
        [accuracy_reward, benchmark_reward(geo3k)],
        SAPOConfig(
            output_dir=str(tmp_path / "out"),
            reward_weights=[1.0, 0.0],
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            num_mini_batches=1,
            max_completion_length=6,
            max_steps=1,
            logging_steps=1,
            critic="shared",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=to_prompts(make_problems(4)),
        eval_dataset=benchmark_dataset(geo3k, str(tmp_path / "rows.parquet"), limit=4, max_pixels=3136),
        processing_class=load_processor(vlm_folder),
    )
    trainer.train()
    assert len(scores) == 4 and any(scores)  # of the evaluation alone
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert evaluated["eval_rewards/geo3k_score/mean"] == pytest.approx(sum(scores) / 4)
    assert evaluated["eval_reward"] == evaluated["eval_rewards/accuracy_reward/mean"] == 0.0


def test_parquet_rows_have_what_training_reads(tmp_path):
    """The columns survive a round trip, for whoever prepares them once."""
    make_problems(2, split="test").to_parquet(tmp_path / "rows.parquet")
    dataset = benchmark_dataset(DRAWN, str(tmp_path / "rows.parquet"))
    dataset.to_parquet(tmp_path / "prepared.parquet")
    again = load_dataset("parquet", data_files=str(tmp_path / "prepared.parquet"), split="train")
    assert again[0]["fields"] == dataset[0]["fields"] and again[0]["prompt"] == dataset[0]["prompt"]
