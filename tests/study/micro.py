"""A study so small that all of its runs take seconds."""

from pathlib import Path

import yaml

from sapo_trl.study.cells import CELL_NAME, Choice, comparison_cells, result_of, tuning_cells
from sapo_trl.study.config import StudyConfig, load_study
from sapo_trl.study.preregistration import freeze
from sapo_trl.study.run_cell import run_cell
from sapo_trl.study.runner import CELLS_FOLDER


SAMPLED = {"num_generations": 1, "num_continuations": 2}
MICRO = {
    "name": "A micro study",
    "baseline": "sapo",
    "tasks": {"short": {"gates": 2, "signs": 4, "pictures": False}},
    "arms": {
        "sapo": {"preset": "sapo", "learning_rate": 0.001},
        "reinforce": {"preset": "reinforce"},
        "vineppo": {"preset": "vineppo", "settings": SAMPLED, "tuned_as": "reinforce"},
        "pairs": {"preset": "vineppo", "settings": SAMPLED, "segmenter": "line_pairs", "tuned_as": "reinforce"},
        "centred": {"preset": "ppo", "centred": True, "learning_rate": 0.001},
    },
    "experiments": {
        "main": {"tasks": ["short"], "arms": ["sapo", "reinforce"], "worlds": [0, 1], "seeds": [0, 1]},
        "exact": {"tasks": ["short"], "arms": ["vineppo", "pairs", "centred"], "worlds": [0], "seeds": [0]},
        "credit": {
            "tasks": ["short"],
            "arms": ["vineppo", "sapo", "reinforce"],
            "worlds": [0],
            "seeds": [0],
            "measure": "credit",
        },
    },
    "preregistered": {
        "tests": {
            "better": {
                "claim": "Segments help",
                "experiment": "main",
                "measure": "log_odds",
                "test": "welch",
                "smallest": 0.5,
                "contrast": {"sapo": 1, "reinforce": -1},
            },
            "surer": {
                "claim": "Segments solve more",
                "experiment": "main",
                "measure": "accuracy",
                "test": "permutation",
                "side": "two",
                "smallest": 0.1,
                "contrast": {"sapo": 1, "reinforce": -1},
            },
        }
    },
    "tuning": {"learning_rate": [0.001], "seeds": [100], "task": "short", "worlds": [0]},
    "budget": {"rollouts": 2, "responses": 16, "mini_batches": 2, "test_problems": 16},
    "settings": {"beta": 0.0, "critic_learning_rate": 0.001, "continuation_batch_size": 512},
    "records": {
        "seeds": [0],
        "valued_arms": ["sapo"],
        "every": 1,
        "responses": 16,
        "valued_responses": 4,
        "continuations": 2,
    },
    "model": {"hidden_size": 64, "layers": 2},
    "warm_start": {"batch_size": 16, "cooldown_steps": 100, "target": 0.0, "learning_rate": 0.004},
}  # fmt: skip


def write_study(folder: Path, content: dict | None = None) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(MICRO if content is None else content, sort_keys=False))
    return load_study(path)


def run_here(study: StudyConfig, output_dir: Path, cache_dir: Path) -> None:
    """Run the cells of a study that have no result, in this process. The tuning has one rate."""
    freeze(study, output_dir)
    tuning = tuning_cells(study)
    chosen = {cell.arm_name: Choice(cell.learning_rate, {}) for cell in tuning}
    for cell in [*tuning, *comparison_cells(study, chosen)]:
        folder = output_dir / CELLS_FOLDER / cell.name
        if result_of(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CELL_NAME).write_text(cell.to_json())
            run_cell(folder, cache_dir)
