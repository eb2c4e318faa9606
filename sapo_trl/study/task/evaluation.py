"""A model's performance on a task: accuracy on unseen problems, and the quality of its decisions."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...rewards.completion import Completion, completion_text
from ...statistics import wilson_interval
from .config import TaskConfig
from .problems import Split, make_problems, sample_problems
from .prompts import encode_prompts
from .steps import is_correct, read_steps


def code_reward(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
    """1.0 for each completion that opens the cells with the problem's numbers, one after the other, else 0.0."""
    return [
        float(is_correct(completion_text(completion), right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def longest_response(config: TaskConfig) -> int:
    """Tokens of a well-formed response, its end included, and a few to spare."""
    revealed = 0 if config.reveal_delay is None else config.gates + 1
    preamble = config.preamble + 2 if config.preamble else 0
    return preamble + config.gates * (5 + config.filler) + revealed + 1 + 5


@dataclass(frozen=True)
class TaskEvaluation:
    """
    Responses to problems of a task.

    Args:
        responses (`list[str]`): one to each problem.
        correct (`list[bool]`): whether its answer is right.
        right_decisions (`float`): share of the decisions that are right.
        complete (`float`): share of the responses that have all steps.
        well_read (`float`): share of the numbers in steps that are read right.
        at_gate (`list[float]`): share of right decisions at each gate.
    """

    responses: list[str]
    correct: list[bool]
    right_decisions: float
    complete: float
    well_read: float
    at_gate: list[float]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson_interval(sum(self.correct), len(self.correct))


@torch.no_grad()
def evaluate_task(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    config: TaskConfig,
    n: int,
    *,
    split: Split = "test",
    temperature: float = 1.0,
    batch_size: int = 512,
    seed: int = 0,
) -> TaskEvaluation:
    """
    Let a model solve problems.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor or tokenizer.
        config ([`TaskConfig`]):
            The task.
        n (`int`):
            Number of problems.
        split (`str`, *optional*, defaults to `"test"`):
            Split to draw them from.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0.0` decodes greedily.
        batch_size (`int`, *optional*, defaults to `512`):
            Problems solved at once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems and of the sampling. The caller's random state is left as it was.
    """
    if temperature < 0:
        raise ValueError(f"`temperature` must be positive, or 0 for greedy decoding, got {temperature}.")
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    tokenizer = getattr(processor, "tokenizer", processor)
    generation_config = GenerationConfig(
        max_new_tokens=longest_response(config),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    problems = sample_problems(config, n, split=split, seed=seed)
    rows = list(make_problems(config, n, split=split, seed=seed))
    was_training = model.training
    model.eval()
    responses: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, n, batch_size):
            inputs = encode_prompts(processor, rows[start : start + batch_size]).to(model.device)
            sequences = model.generate(**inputs, generation_config=generation_config)
            tokens = sequences[:, inputs["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    model.train(was_training)
    solutions = [read_steps(problem, response) for problem, response in zip(problems, responses, strict=True)]
    steps = [step for solution in solutions for step in solution.steps]
    at_gate = []
    for gate in range(config.gates):
        decided = [solution.steps[gate].right for solution in solutions if len(solution.steps) > gate]
        at_gate.append(sum(decided) / max(len(decided), 1))
    return TaskEvaluation(
        responses=responses,
        correct=[solution.correct for solution in solutions],
        right_decisions=sum(step.right for step in steps) / max(len(steps), 1),
        complete=sum(solution.complete for solution in solutions) / n,
        well_read=sum(step.read for step in steps) / max(len(steps), 1),
        at_gate=at_gate,
    )
