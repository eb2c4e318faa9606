"""
Segment-Aligned Policy Optimization (SAPO, arXiv 2605.01327): the algorithm on one page.

    python examples/sapo_in_one_file.py

A vision-language model of 0.9M parameters looks at a drawn quadrilateral, adds up its sides step by step, and learns
from right and wrong answers. Everything runs offline, on a CPU, in a few minutes; with seed 0 the accuracy rises from
35 % to 76 %. One step of training:

1. Generate: the policy writes one response to each prompt.
2. Score: compute the log-probability and the entropy of every token under the policy that wrote the response.
3. Cut: a segment ends at each of the response's 30 % highest-entropy tokens.
4. Value: a critic predicts the reward from the state before each segment.
5. Advantage: generalized advantage estimation (GAE), with segments instead of tokens as time steps.
6. Losses: PPO's clipped loss with one importance ratio per segment, and the critic's squared error.
7. Update: one optimizer step of the policy and the critic for each of four mini-batches.

The model, the problems and the reward come from `sapo_trl`. The algorithm is all here, and `SAPOTrainer` computes the
same numbers (tests/repository/test_one_file.py).

Shapes: B responses, L tokens of prompt and response, T tokens of the response, M segments. A response of T tokens has
at most T segments, so M = T here. The columns after a response's last segment hold 0.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.optim import AdamW
from transformers import AutoModelForImageTextToText, HfArgumentParser, ProcessorMixin

from sapo_trl.embedded import default_cache_dir, evaluate, load_processor, make_problems, warm_start
from sapo_trl.embedded.evaluation import encode_prompts
from sapo_trl.rewards import accuracy_reward


Inputs = dict[str, Tensor]  # of a model: token ids, masks and pictures


@dataclass
class Config:
    # The algorithm, with the values of the preset "sapo": the paper's equations and its Table 7.
    top_percent: float = 30.0  # share of a response's tokens that end a segment
    gamma: float = 1.0  # discount per segment
    lam: float = 0.99  # GAE's lambda, per segment
    epsilon: float = 0.2  # distance from 1 at which a ratio is clipped
    beta: float = 0.001  # weight of the KL penalty in the reward
    temperature: float = 1.0
    num_mini_batches: int = 4  # optimizer steps per rollout
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    # The task. The preset's learning rates, 1e-6 and 2e-6, are for models of billions of parameters.
    learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4
    max_completion_length: int = 64
    batch_size: int = 256  # responses per rollout
    num_steps: int = 14  # rollouts
    num_test_problems: int = 512
    seed: int = 0


class Critic(Module):
    """A copy of the policy's transformer, with a scalar head instead of the language-model head."""

    def __init__(self, policy: Module):
        super().__init__()
        self.backbone = copy.deepcopy(policy.model)
        hidden_size = policy.config.get_text_config().hidden_size
        self.head = nn.Linear(hidden_size, 1)
        # Values start near 0, but not at 0: a head of zeros would pass no gradient on to the backbone.
        nn.init.normal_(self.head.weight, std=0.1 / hidden_size**0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden_states = self.backbone(**inputs, use_cache=False).last_hidden_state  # (B, L, hidden_size)
        return self.head(hidden_states).squeeze(-1)  # (B, L)


def append_completions(prompts: Inputs, completion_ids: Tensor, mask: Tensor) -> Inputs:
    """The models' inputs: left-padded prompts with their pictures, then right-padded completions."""
    completions = {
        "input_ids": completion_ids,  # (B, T)
        "attention_mask": mask.long(),  # (B, T)
        "mm_token_type_ids": torch.zeros_like(completion_ids),  # (B, T): 0 is text, 1 is image
    }
    joined = {name: torch.cat([prompts[name], x], dim=1) for name, x in completions.items()}
    return {**prompts, **joined}


def take_rows(inputs: Inputs, rows: Tensor) -> Inputs:
    """The models' inputs for some of the responses. Every prompt has one picture, and all pictures have one size."""
    patches = inputs["pixel_values"].unflatten(0, (len(inputs["input_ids"]), -1))  # (B, patches, pixels)
    others = {name: x[rows] for name, x in inputs.items() if name != "pixel_values"}
    return {**others, "pixel_values": patches[rows].flatten(0, 1)}


@torch.no_grad()
def generate(policy: Module, processor: ProcessorMixin, prompts: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    """Step 1. Token ids of one response to each prompt, right-padded, and the mask of its tokens: (B, T) each."""
    sequences = policy.generate(
        **prompts,
        do_sample=True,
        temperature=config.temperature,
        top_k=0,  # no filter
        max_new_tokens=config.max_completion_length,
        suppress_tokens=[policy.config.image_token_id],  # it stands for a picture, and a response has none
    )  # (B, L)
    completion_ids = sequences[:, prompts["input_ids"].size(1) :]
    is_eos = completion_ids == processor.tokenizer.eos_token_id
    mask = is_eos.cumsum(dim=1) - is_eos.long() == 0  # up to and including the first end-of-sequence token
    return completion_ids, mask


def score(model: Module, inputs: Inputs, num_tokens: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Step 2. Log-probabilities of the last T tokens, and entropies of their distributions: (B, T) each."""
    # The logits at a position predict the token at the next position.
    logits = model(**inputs, use_cache=False, logits_to_keep=num_tokens + 1).logits[:, :-1]  # (B, T, vocabulary)
    log_probs = (logits / temperature).log_softmax(dim=-1)
    completion_ids = inputs["input_ids"][:, -num_tokens:]  # (B, T)
    logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return logps, entropies


def cut_into_segments(entropies: Tensor, mask: Tensor, top_percent: float) -> Tensor:
    """Step 3. Index of each token's segment, 0, 1, 2, … from left to right, and -1 for padding: (B, T)."""
    num_cuts = torch.ceil(mask.sum(1, keepdim=True) * top_percent / 100)  # (B, 1)
    # The sort is stable: of equal entropies the earlier token comes first.
    order = entropies.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)  # (B, T)
    rank = order.argsort(dim=1)  # (B, T): 0 for the token with the highest entropy
    is_cut = mask & (rank < num_cuts)  # (B, T)
    # A cut token is the last of its segment, so a token's index is the number of cuts before the token.
    segment_ids = is_cut.cumsum(dim=1) - is_cut.long()
    return segment_ids.masked_fill(~mask, -1)


def segment_sum(x: Tensor, segment_ids: Tensor) -> Tensor:
    """Sum over the tokens of each segment, without padding: (B, T) -> (B, M)."""
    return torch.zeros_like(x).scatter_add(1, segment_ids.clamp(min=0), x * (segment_ids >= 0))


def to_tokens(y: Tensor, segment_ids: Tensor) -> Tensor:
    """Each token gets the number of its segment, padding gets 0: (B, M) -> (B, T)."""
    return y.gather(1, segment_ids.clamp(min=0)) * (segment_ids >= 0)


def segment_values(critic: Module, inputs: Inputs, segment_ids: Tensor) -> Tensor:
    """Step 4. Value of the state before the first token of each segment: (B, M)."""
    # The critic's output at a position is the value of the state before the token at the next position.
    values = critic(**inputs)[:, -segment_ids.size(1) - 1 : -1]  # (B, T)
    previous_ids = nn.functional.pad(segment_ids[:, :-1], (1, 0), value=-1)  # (B, T)
    is_first = segment_ids > previous_ids  # (B, T)
    return segment_sum(values * is_first, segment_ids)


def segment_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Step 5. Advantages and returns of the segments, from their rewards and values: (B, M) each."""
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,): 0 after the last segment
    for m in reversed(range(values.size(1))):
        delta = rewards[:, m] + gamma * next_value - values[:, m]
        advantages[:, m] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, m]
    return advantages, advantages + values


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, segment_ids: Tensor, epsilon: float) -> Tensor:
    """Step 6. PPO's clipped loss with one ratio per segment: mean over a response's tokens, then over responses."""
    lengths = segment_sum(torch.ones_like(logps), segment_ids)  # (B, M)
    log_ratios = (logps - old_logps).clamp(-20, 20)  # (B, T): one token cannot make a ratio overflow
    # The tokens of a segment share one ratio, the geometric mean of the ratios of its tokens.
    segment_ratios = torch.exp(segment_sum(log_ratios, segment_ids) / lengths.clamp(min=1))  # (B, M)
    ratios, advantages = to_tokens(segment_ratios, segment_ids), to_tokens(advantages, segment_ids)  # (B, T)
    token_losses = torch.maximum(-ratios * advantages, -ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return (token_losses.sum(1) / lengths.sum(1)).mean()


def value_loss(values: Tensor, returns: Tensor, segment_ids: Tensor) -> Tensor:
    """Step 6. The critic's squared error, halved: mean over a response's segments, then over responses."""
    num_segments = segment_ids.amax(1) + 1  # (B,)
    errors = 0.5 * (values - returns).square()  # (B, M): 0 after the last segment
    return (errors.sum(1) / num_segments).mean()


@dataclass
class Rollout:
    inputs: Inputs  # of the models: prompts, pictures and responses
    old_logps: Tensor  # (B, T)
    segment_ids: Tensor  # (B, T)
    values: Tensor  # (B, M)
    advantages: Tensor  # (B, M)
    returns: Tensor  # (B, M)


@torch.no_grad()
def make_rollout(
    policy: Module, reference: Module, critic: Module, inputs: Inputs, mask: Tensor, rewards: Tensor, config: Config
) -> Rollout:
    """Steps 2 to 5. Responses with their mask (B, T) and rewards (B,) become the inputs of the two losses."""
    old_logps, entropies = score(policy, inputs, mask.size(1), config.temperature)
    segment_ids = cut_into_segments(entropies, mask, config.top_percent)
    values = segment_values(critic, inputs, segment_ids)
    # Every token pays for its distance to the reference policy (KL, estimator k1). The last token gets the reward.
    ref_logps, _ = score(reference, inputs, mask.size(1), config.temperature)
    token_rewards = -config.beta * (old_logps - ref_logps)  # (B, T)
    token_rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += rewards
    segment_rewards = segment_sum(token_rewards, segment_ids)  # (B, M)
    advantages, returns = segment_gae(segment_rewards, values, config.gamma, config.lam)
    return Rollout(inputs, old_logps, segment_ids, values, advantages, returns)


def make_optimizer(policy: Module, critic: Module, config: Config) -> AdamW:
    """AdamW for both models, which share no parameter. Weight decay applies to matrices, not to biases and norms."""
    # (transformers' Trainer also decays the norms of this vision tower: it looks for other names.)
    groups = [
        {"params": parameter, "lr": lr, "weight_decay": config.weight_decay if parameter.dim() > 1 else 0.0}
        for model, lr in ((policy, config.learning_rate), (critic, config.critic_learning_rate))
        for parameter in model.parameters()
    ]
    return AdamW(groups)


def update(
    policy: Module, critic: Module, optimizer: AdamW, rollout: Rollout, rows: Tensor, config: Config
) -> tuple[float, float]:
    """Steps 6 and 7. One optimizer step on a mini-batch, some rows of the rollout. Returns the two losses."""
    inputs, segment_ids = take_rows(rollout.inputs, rows), rollout.segment_ids[rows]
    logps, _ = score(policy, inputs, segment_ids.size(1), config.temperature)
    values = segment_values(critic, inputs, segment_ids)
    pg_loss = policy_loss(logps, rollout.old_logps[rows], rollout.advantages[rows], segment_ids, config.epsilon)
    v_loss = value_loss(values, rollout.returns[rows], segment_ids)
    optimizer.zero_grad()
    (pg_loss + v_loss).backward()
    for model in (policy, critic):
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return pg_loss.item(), v_loss.item()


def explained_variance(rollout: Rollout) -> float:
    """Share of the returns' variance that the values explain: 1 is perfect, 0 is no better than a constant."""
    is_segment = torch.arange(rollout.values.size(1)) <= rollout.segment_ids.amax(1, keepdim=True)  # (B, M)
    returns, values = rollout.returns[is_segment], rollout.values[is_segment]
    return (1 - (returns - values).var() / returns.var()).item()


def train(policy: Module, processor: ProcessorMixin, config: Config) -> None:
    torch.manual_seed(config.seed)
    reference, critic = copy.deepcopy(policy), Critic(policy)
    optimizer = make_optimizer(policy, critic, config)
    problems = make_problems(config.num_steps * config.batch_size, seed=config.seed)
    for step in range(config.num_steps):
        batch = problems.select(range(step * config.batch_size, (step + 1) * config.batch_size))
        prompts = encode_prompts(processor, batch)
        completion_ids, mask = generate(policy, processor, prompts, config)
        completions = processor.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = torch.tensor(accuracy_reward(completions=completions, answer=batch["answer"]))  # (B,)
        inputs = append_completions(prompts, completion_ids, mask)
        rollout = make_rollout(policy, reference, critic, inputs, mask, rewards, config)
        mini_batches = torch.randperm(config.batch_size).chunk(config.num_mini_batches)
        losses = [update(policy, critic, optimizer, rollout, rows, config) for rows in mini_batches]
        pg_loss, v_loss = torch.tensor(losses).mean(0)
        num_segments = (rollout.segment_ids.amax(1) + 1.0).mean()
        print(
            f"step {step + 1}  reward {rewards.mean():.3f}  segments {num_segments:.1f}  policy loss {pg_loss:+.4f}  "
            f"value loss {v_loss:.4f}  explained variance {explained_variance(rollout):+.3f}"
        )


if __name__ == "__main__":
    [config] = HfArgumentParser(Config).parse_args_into_dataclasses()
    print("warm start: supervised training for a few minutes, once")
    folder = warm_start(default_cache_dir())
    policy, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)
    test = make_problems(config.num_test_problems, split="test", seed=config.seed)
    print(f"accuracy before: {evaluate(policy, processor, test).accuracy:.1%}")
    train(policy, processor, config)
    print(f"accuracy after: {evaluate(policy, processor, test).accuracy:.1%}")
