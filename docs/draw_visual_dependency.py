"""
Does a token's dependence on the picture tell readings from sums? `python docs/draw_visual_dependency.py` draws
`docs/images/visual_dependency.png` and prints the numbers of `docs/algorithms.md`.

The policy is the warm start of the embedded task (about three minutes on a laptop if it is not cached). It samples a
solution of 256 problems that it has not seen, and scores each again with half of the picture's visual tokens hidden,
eight times.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from sapo_trl.embedded import load_processor, make_problems, warm_start  # noqa: E402
from sapo_trl.embedded.evaluation import encode_prompts, evaluate  # noqa: E402
from sapo_trl.embedded.imitation import IGNORED_LABEL, append_solutions  # noqa: E402
from sapo_trl.embedded.warm_start import default_cache_dir  # noqa: E402
from sapo_trl.image_corruption import hide_tokens  # noqa: E402
from sapo_trl.token_mask import largest_share  # noqa: E402
from sapo_trl.trainer.sight import patch_layout  # noqa: E402
from sapo_trl.visual_dependency import visual_dependency  # noqa: E402


PICTURE = Path(__file__).parent / "images" / "visual_dependency.png"
KINDS = ("length", "form of a reading", "number in a sum", "result", "form of a sum", "answer and its form")
PROBLEMS, DRAWS, SHARE = 256, 8, 0.4


def kinds_of(pieces: list[str]) -> list[str]:
    """The kind of each token of a solution: lines such as `AB=7`, then `7+3=10`, then the boxed answer."""
    kinds, line, behind_equals = [], "", False
    for piece in pieces:
        if "boxed" in line + piece:
            kinds.append(KINDS[5])
        elif line[:1].isalpha() or (not line and piece[:1].isalpha()):
            kinds.append(KINDS[0] if piece.strip().isdigit() else KINDS[1])
        elif piece.strip().isdigit():
            kinds.append(KINDS[3] if behind_equals else KINDS[2])
        else:
            kinds.append(KINDS[4] if line or piece.strip() else KINDS[5])
        behind_equals = (behind_equals or "=" in piece) and "\n" not in piece
        line = "" if "\n" in piece else line + piece
        if line.startswith("\\") and kinds[-1] != KINDS[5]:
            kinds[-1] = KINDS[5]
    return kinds


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """float32 `(B, T)`: at each token of a solution its log-probability."""
    logits = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logits.gather(2, labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)


def measure() -> tuple[torch.Tensor, list[list[str]], torch.Tensor]:
    """Dependence on the picture `(draws, B, T)`, the kind of each token of each solution, and the mask `(B, T)`."""
    folder = warm_start(default_cache_dir())
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), load_processor(folder)
    problems = make_problems(PROBLEMS, split="test")
    solutions = evaluate(model, processor, problems).completions
    inputs = append_solutions(encode_prompts(processor, list(problems)), solutions, processor.tokenizer)
    labels = inputs.pop("labels")
    mask = labels[:, 1:] != IGNORED_LABEL
    layout, counts = patch_layout(model, processor), inputs["image_grid_thw"].prod(-1)
    plain = log_probabilities(model, inputs, labels)
    draws = []
    for seed in range(DRAWS):
        hidden = hide_tokens(inputs["pixel_values"], counts, layout, 0.5, seed)
        corrupted = log_probabilities(model, {**inputs, "pixel_values": hidden}, labels)
        draws.append(torch.where(mask, visual_dependency(plain, corrupted), 0))
    decode = processor.tokenizer.decode
    kinds = [
        kinds_of([decode([token]) for token in row[keep].tolist()])
        for row, keep in zip(labels[:, 1:], mask, strict=True)
    ]
    return torch.stack(draws), kinds, mask


def probability_of_more(one: torch.Tensor, other: torch.Tensor) -> float:
    """Probability that a number of one sample is larger than a number of the other; a tie counts half."""
    ordered = other.sort().values
    below = torch.searchsorted(ordered, one, right=False) + torch.searchsorted(ordered, one, right=True)
    return below.double().mean().item() / 2 / len(other)


def draw(d: dict[str, torch.Tensor], chosen: dict[str, float], path: Path) -> None:
    """Distributions by kind, and the share of each kind that a mask of 40 % keeps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[2, 1], layout="constrained", sharey=True)
    numbers = [d[kind].clamp(min=1e-8).log10().numpy() for kind in KINDS]
    places = range(len(KINDS), 0, -1)
    parts = axes[0].violinplot(numbers, places, orientation="horizontal", widths=0.8, showextrema=False, points=200)
    for kind, body in zip(KINDS, parts["bodies"], strict=True):
        body.set(facecolor="black" if kind == KINDS[0] else "#999999", alpha=0.8)
    axes[0].plot([d[kind].mean().log10().item() for kind in KINDS], places, "o", color="white", mec="black", ms=6)
    axes[0].set(yticks=list(places), yticklabels=KINDS, xlabel="dependence d on the picture (circle: mean)")
    axes[0].set(xticks=range(-8, 2, 2), xticklabels=["≤1e-8", "1e-6", "1e-4", "0.01", "1"])
    axes[1].barh(list(places), [100 * chosen[kind] for kind in KINDS], color=["black", *["#999999"] * 5])
    axes[1].axvline(100 * SHARE, color="black", lw=1, ls=":")
    axes[1].set(xlabel="tokens kept by visual_token_share=0.4, %", xlim=(0, 100))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    draws, kinds, mask = measure()
    names = [kind for row in kinds for kind in row]
    kept = torch.stack([largest_share(d, mask, SHARE) for d in draws])[:, mask]
    flat = draws[:, mask]
    is_kind = {kind: torch.tensor([name == kind for name in names]) for kind in KINDS}
    d = {kind: flat[:, where].flatten() for kind, where in is_kind.items()}
    chosen = {kind: kept[:, where].double().mean().item() for kind, where in is_kind.items()}
    for kind in KINDS:
        middle = d[kind].median().item()
        print(
            f"{kind}: {len(d[kind]) // DRAWS} tokens, mean {d[kind].mean():.3g}, median {middle:.2g}, "
            f"share of all d {d[kind].sum() / flat.sum():.1%}, kept {chosen[kind]:.1%}"
        )
    sums = torch.cat([d[kind] for kind in KINDS[2:5]])
    narrow = torch.stack([largest_share(x, mask, 0.1) for x in draws])[:, mask]
    lengths = is_kind[KINDS[0]].expand_as(narrow)
    found, among = narrow[lengths].double().mean(), lengths[narrow].double().mean()
    print(f"a mask of 10 % keeps {found:.1%} of the lengths; they are {among:.1%} of its tokens")
    print(f"P(d of a length > d of a token in a sum) = {probability_of_more(d[KINDS[0]], sums):.3f}")
    averaged = flat.mean(0)
    sums = averaged[torch.stack([is_kind[kind] for kind in KINDS[2:5]]).any(0)]
    print(f"the same, d averaged over {DRAWS} draws = {probability_of_more(averaged[is_kind[KINDS[0]]], sums):.3f}")
    draw(d, chosen, PICTURE)


if __name__ == "__main__":
    main()
