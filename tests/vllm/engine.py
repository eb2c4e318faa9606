"""Asks a vLLM engine as TRL's colocated one is asked, in a process of its own: engines keep their memory."""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main(folder: Path) -> None:
    """Reads `requests.json` (token ids, pictures), writes `answers.json` (prompts, tokens, log-probabilities)."""
    requests = json.loads((folder / "requests.json").read_text())
    engine = LLM(
        model=str(folder / "model"), dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True, seed=0
    )
    prompts = [
        {
            "prompt_token_ids": request["prompt_ids"],
            "multi_modal_data": {"image": [Image.open(folder / name) for name in request["images"]]},
        }
        for request in requests
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)
    answers = []
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        best = output.outputs[0]
        logps = [position[token].logprob for token, position in zip(best.token_ids, best.logprobs, strict=True)]
        answers.append({"prompt_ids": output.prompt_token_ids, "token_ids": list(best.token_ids), "logps": logps})
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
