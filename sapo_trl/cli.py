"""The `sapo-trl` command: `demo`, `train`, `eval`, `plan`, `analyze`, `study` and `view`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program's name. Defaults to those of the process.

    Returns:
        `int`: Exit code; not 0 if the demo could not show an improvement, or if what was planned does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # TRL's parser takes all of the rest, `--help` included
        from .train import main as train_main

        return train_main(argv[1:])
    if argv[:1] == ["eval"]:  # so do this one's
        from .evaluation.command import main as eval_main

        return eval_main(argv[1:])
    if argv[:1] == ["plan"]:
        from .planner.command import main as plan_main

        return plan_main(argv[1:])
    if argv[:1] == ["analyze"]:
        from .analysis.command import main as analyze_main

        return analyze_main(argv[1:])
    if argv[:1] == ["study"]:
        from .study.command import main as study_main

        return study_main(argv[1:])
    if argv[:1] == ["view"]:
        from .viewer.command import main as view_main

        return view_main(argv[1:])

    parser = argparse.ArgumentParser(
        prog="sapo-trl", description="Segment-Aligned Policy Optimization (arXiv 2605.01327) for TRL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model; settings from a YAML file (--config) and the command line")
    commands.add_parser("eval", help="evaluate a model on benchmarks, and table the results beside the paper's")
    commands.add_parser("plan", help="compute the GPU memory that a training needs, and what would make it fit")
    commands.add_parser("analyze", help="ask the recordings of a finished run what its segments do")
    commands.add_parser("study", help="compare algorithms: several seeds, equal budgets and tuning, one report")
    commands.add_parser("view", help="write a page to look at a run's responses, token by token")
    demo = commands.add_parser(
        "demo",
        help="train a tiny vision-language model on a CPU and show what it learned",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="where the results go")
    demo.add_argument("--rollouts", type=_positive, default=14, help="rollouts of 256 responses to train on")
    demo.add_argument("--problems", type=_positive, default=1024, help="test problems for each measured accuracy")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything")
    arguments = parser.parse_args(argv)

    from .demo import run_demo

    return run_demo(arguments.output_dir, arguments.rollouts, arguments.problems, arguments.seed)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
