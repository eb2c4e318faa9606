"""A short run for `test_survival.py` to kill: resumes from what it finds, saves at every step, says so."""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from sapo_trl import StopOnSignal
from sapo_trl.embedded import build_tokenizer
from sapo_trl.run_folder import newest_checkpoint
from tests.testing_utils import FAMILIES, sapo_trainer


class Announce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def main(folder: Path, steps: int, stop_on_signal: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = sapo_trainer(
        FAMILIES["qwen2"](build_tokenizer()),
        folder,
        max_steps=steps,
        num_mini_batches=4,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        critic_learning_rate=0.01,
        save_strategy="steps",
        save_steps=1,
        trainer_kwargs={"callbacks": [Announce()]},
    )
    stop = StopOnSignal() if stop_on_signal else None
    if stop is not None:
        trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    modules = {"policy": trainer.model, "critic": trainer.critic.value_head}
    state = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
    torch.save(state, folder / "final.pt")
    return StopOnSignal.EXIT_CODE if stop is not None and stop.received is not None else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), "--stop-on-signal" in sys.argv))
