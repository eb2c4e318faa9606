"""`sapo-trl train`: [`SAPOTrainer`] from a YAML file and the command line."""

import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..callbacks import SegmentationCallback, StopOnSignal
from ..callbacks.progress import show_progress
from ..config import SAPOConfig
from ..data import (
    FORMATS,
    CleaningReport,
    DataFormat,
    ImageLimits,
    clean_prompts,
    load_rows,
    own_columns,
    save_reports,
    to_prompts,
)
from ..data.columns import check_roles
from ..data.formats import FORMAT_OF_HUB_ID, FormatName
from ..data.templates import template_text
from ..embedded import (
    default_cache_dir,
    load_processor,
    make_problems,
    save_untrained,
    warm_start,
    warm_start_folder,
)
from ..folder_lock import FolderInUseError, locked
from ..rewards.lookup import find_reward
from ..run_folder import TRAINER_STATE_NAME, newest_checkpoint
from ..settings import PositiveInt, check_settings, help_from_docstring
from ..trainer import SAPOTrainer
from ..trainer.checkpoint_files import check_checkpoint, finish_publication
from ..trainer.checks import check_size
from .dry_run import algorithm_name, show_data, show_plan, show_sample
from .launch import check_launched, launch
from .run_arguments import RunRequest, parse_run


EMBEDDED = "embedded"
"""Name of the embedded task, as a model or a data set. It needs no download."""


@help_from_docstring
@dataclass
class TrainArguments:
    """
    Settings for data, rewards and the critic's start; the model is in [`~trl.ModelConfig`], everything else in
    [`SAPOConfig`].

    Args:
        value_model (`str`, *optional*):
            Model to start the critic from, a folder or a hub id; by default the policy. It may be smaller than the
            policy or a reward model, but must read the same tokens and images. A critic that was saved is loaded as
            a whole. `model_revision` is the policy's alone.
        dataset_name (`str`, *optional*, defaults to `"embedded"`):
            Data set: `"embedded"`, a hub id, a file or a folder. See [`~sapo_trl.data.load_rows`]. `"embedded"` is
            taken as it is: of the settings below only the splits and `embedded_problems` concern it.
        dataset_config (`str`, *optional*):
            Configuration of the data set.
        dataset_format (`str`, *optional*):
            Format of a copy of a known data set: `geometry3k`, `gsm8k`, `math`, `math12k` or `open_r1`. With the
            hub id of the data set, no format is needed. A data set with a column `prompt` is taken to have TRL's form.
        columns (`dict[str, str]`, *optional*):
            Columns of your own data set, as in `{"problem": "question", "answer": "final"}`. By default `problem`,
            `answer` and, if there is one, `images` or `image`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, or a slice of it such as `"train[:90%]"`.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if `eval_strategy` is set. It can also be a slice.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows only when they are needed; `max_steps` must be set.
        embedded_problems (`int`, *optional*, defaults to `8192`):
            Training problems of the embedded data set, at most 23,916.
        prompt_template (`str`, *optional*, defaults to `"none"`):
            Text around each question: the name of a template such as `"boxed"`, or a text of your own. The names are
            in [`~sapo_trl.data.templates.TEMPLATES`]. The question replaces `{problem}` in your text; without it, the
            text follows the question.
        conversational (`bool`, *optional*, defaults to `True`):
            Use chat messages (off: plain text). Plain text is for text data and models without a chat template.
        min_pixels (`int`, *optional*):
            Enlarge smaller pictures to this many pixels.
        max_pixels (`int`, *optional*):
            Reduce larger pictures to this many pixels.
        max_prompt_length (`int`, *optional*):
            Leave out prompts with more tokens, image tokens included.
        allow_remote_images (`bool`, *optional*, defaults to `False`):
            Fetch pictures that rows name by an address on the network. By default nothing is fetched: such rows are
            left out.
        strict (`bool`, *optional*, defaults to `False`):
            Stop with an error at the first unusable row. By default such rows are left out, counted and listed in
            `OUTPUT_DIR/data_report.json`.
        reward_funcs (`list[str]`, *optional*, defaults to `["accuracy_reward"]`):
            Names from `sapo_trl.rewards`, or import paths such as `my_package.my_reward`. See
            [`~sapo_trl.rewards.lookup.find_reward`].
        reward_settings (`dict[str, dict]`, *optional*):
            Arguments of reward functions, as in `{"numeric_reward": {"rel_tol": 0.01}}`. The functions go by their
            names in `reward_funcs`.
        record_every (`int`, *optional*):
            Record the responses of every n-th rollout, for `sapo-trl view` and `sapo-trl analyze`. They go to
            `OUTPUT_DIR/segments`. By default nothing is recorded.
    """

    value_model: str | None = None
    dataset_name: str = EMBEDDED
    dataset_config: str | None = None
    dataset_format: FormatName | None = None
    columns: dict[str, str] | str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    streaming: bool = False
    embedded_problems: PositiveInt = 8192
    prompt_template: str = "none"
    conversational: bool = True
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    max_prompt_length: PositiveInt | None = None
    allow_remote_images: bool = False
    strict: bool = False
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy_reward"])
    reward_settings: dict[str, dict[str, Any]] | str | None = None
    record_every: PositiveInt | None = None

    def __post_init__(self):
        # Find every mistake that can be found without data.
        check_settings(self)
        self.columns = _from_command_line(self.columns)
        if self.columns is not None and not isinstance(self.columns, dict):
            raise ValueError(
                f"`columns` must name columns, such as {{problem: question, answer: final}} in YAML or "
                f'{{"problem": "question", "answer": "final"}} on the command line, got {self.columns!r}.'
            )
        check_roles(self.columns or {})
        if self.dataset_format is not None and self.columns:
            raise ValueError("`dataset_format` and `columns` both describe the columns of a row: set only one.")
        self.reward_settings = _from_command_line(self.reward_settings) or {}
        if not isinstance(self.reward_settings, dict) or set(self.reward_settings) - set(self.reward_funcs):
            raise ValueError(
                "`reward_settings` must be settings of functions in `reward_funcs`, such as "
                f"{{numeric_reward: {{rel_tol: 0.01}}}}; `reward_funcs` are {self.reward_funcs}, got "
                f"{self.reward_settings!r}."
            )
        template_text(self.prompt_template)
        _ = self.image_limits

    @property
    def image_limits(self) -> ImageLimits:
        """`min_pixels` and `max_pixels`."""
        return ImageLimits(self.min_pixels, self.max_pixels)


def main(argv: Sequence[str]) -> int:
    """
    Train with the settings of a file and of the command line, and save the model.

    Returns the exit code: 0; 2 if settings, data or a reward function are wrong; 75 if a signal stopped training, and
    there is a checkpoint.
    """
    request = parse_run(argv, TrainArguments, SAPOConfig, ModelConfig)
    if request.launch:
        return launch(request.launch, ["train", *request.arguments])
    _, training_args, model_args = request.settings
    if model_args.model_name_or_path is None:
        wanted = "--model_name_or_path is required: 'embedded', a local path or a hub id"
        print(f"sapo-trl train: error: {wanted}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        if training_args.should_save and not request.dry_run:
            # Hold the lock from the search for the newest checkpoint until the model is saved.
            try:
                stack.enter_context(locked(training_args.output_dir, "trains"))
                finish_publication(training_args.output_dir)
            except (FolderInUseError, OSError) as error:
                print(f"sapo-trl train: error: {error}", file=sys.stderr)
                return 2
        return _train(request, Path(stack.enter_context(tempfile.TemporaryDirectory())))


def _train(request: RunRequest, scratch: Path) -> int:
    """Train, or show a dry run. The folder `scratch` is removed afterwards."""
    arguments, training_args, model_args = request.settings
    if training_args.process_index == 0 and (line := request.lost_line()) is not None:
        print(line)
    shows = request.dry_run and training_args.process_index == 0
    if shows:
        show_plan(request)
    if request.dry_run:  # it leaves nothing behind
        training_args.output_dir = str(scratch / "out")
    try:
        check_launched(training_args.world_size)
        checkpoint = None if request.dry_run else _checkpoint(training_args)
        if training_args.critic == "adapter" and not model_args.use_peft:
            raise ValueError("`critic: adapter` lives beside the policy's adapter: set `use_peft: true`.")
        untrained = None
        if request.dry_run and not warm_start_folder(default_cache_dir()).exists():
            untrained = scratch / "untrained"
        reward_funcs, model, processing_class, loaded = _load(arguments, training_args, model_args, untrained)
        train_dataset = loaded[0][0]
        if not request.dry_run:  # a dry run prints this error with its other results
            check_size(train_dataset, training_args.generation_batch_size, training_args.num_generations)
    except (ValueError, OSError, ImportError) as error:
        print(f"sapo-trl train: error: {error}", file=sys.stderr)
        return 2
    if shows:
        show_data(train_dataset, training_args, model == str(untrained))
    eval_dataset = loaded[1][0] if len(loaded) > 1 else None
    reports = [report for _, report in loaded if report is not None]
    if training_args.should_save and reports and not arguments.streaming:
        rich.print(*reports, sep="\n")
        save_reports(reports, Path(training_args.output_dir) / "data_report.json")
    callbacks = []
    if arguments.record_every is not None:
        folder = Path(training_args.output_dir) / "segments"
        callbacks.append(SegmentationCallback(folder, every=arguments.record_every))
    try:
        trainer = SAPOTrainer(
            model,
            reward_funcs,
            training_args,
            train_dataset,
            value_model=arguments.value_model,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except ValueError as error:  # settings that do not fit this model
        print(f"sapo-trl train: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # missing files
        print(f"sapo-trl train: error: {_unloadable(model, error)}", file=sys.stderr)
        return 2
    if request.dry_run:
        show_sample(trainer)
        return 0
    stop = StopOnSignal((signal.SIGTERM, signal.SIGINT))
    trainer.add_callback(stop)
    show_progress(trainer, algorithm=algorithm_name(training_args))
    trainer.train(resume_from_checkpoint=checkpoint)
    if training_args.should_save and reports and arguments.streaming:  # a stream's rows have been read only now
        rich.print(*reports, sep="\n")
        save_reports(reports, Path(training_args.output_dir) / "data_report.json")
    if stop.received is not None:
        trainer.accelerator.print(
            "Stopped by a signal. To continue, run the same command with `--resume_from_checkpoint True`."
        )
        trainer.accelerator.end_training()
        return StopOnSignal.EXIT_CODE
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # the log: learning curves for `sapo-trl view`
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_id(arguments))
    else:
        trainer.create_model_card(dataset_name=_hub_id(arguments))
    trainer.accelerator.end_training()
    return 0


def _load(
    arguments: TrainArguments, training_args: SAPOConfig, model_args: ModelConfig, untrained: Path | None = None
) -> tuple[list[Callable], str, PreTrainedTokenizerBase | ProcessorMixin, list[tuple]]:
    """
    The reward functions, the model's folder or name, its processor, and each split's [`load_prompts`]. An untrained
    model, in the folder `untrained`, stands for the embedded one if there is such a folder's name.
    """
    # Load everything that needs no model first, so that a mistake shows at once.
    reward_funcs = [find_reward(name, arguments.reward_settings.get(name)) for name in arguments.reward_funcs]
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,  # no pickles
        **(training_args.model_init_kwargs or {}),
    }
    model = model_args.model_name_or_path
    if model == EMBEDDED and untrained is not None:
        save_untrained(untrained)
        model = str(untrained)
    elif model == EMBEDDED:
        model = str(warm_start(default_cache_dir(), on_progress=_print_progress))
    try:
        processing_class = load_processor(
            model, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(_unloadable(model, error)) from error
    splits = [arguments.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(arguments.dataset_test_split)
    with training_args.main_process_first(desc="preparing data"):  # the other processes read its cache
        loaded = [load_prompts(arguments, split, training_args.seed, processing_class) for split in splits]
    return reward_funcs, model, processing_class, loaded


def _unloadable(model: str, error: Exception) -> str:
    """An error of one line about a model. Transformers' own has several."""
    return f"model_name_or_path={model!r} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}"


def _hub_id(arguments: TrainArguments) -> str | None:
    """The data set's hub id for the model card; `None` for a path of this machine."""
    local = arguments.dataset_name == EMBEDDED or Path(arguments.dataset_name).exists()
    return None if local else arguments.dataset_name


def _from_command_line(value: Any) -> Any:
    """A structured value. YAML gives it as it is; the command line gives JSON. Any other text stays a text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def _checkpoint(training_args: SAPOConfig) -> str | None:
    """The checkpoint to resume from. `True` means the newest complete checkpoint, or a fresh start without any."""
    wanted = training_args.resume_from_checkpoint
    if str(wanted).lower() in ("none", "false"):
        return None
    if str(wanted).lower() != "true":
        if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint={str(wanted)!r} is no checkpoint: a checkpoint is a folder with a "
                f"{TRAINER_STATE_NAME}. `True` takes the newest checkpoint in {training_args.output_dir!r}."
            )
        check_checkpoint(wanted)
        return wanted
    folder = training_args.output_dir
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        print(f"No checkpoint in {folder} yet: starting anew")
        return None
    check_checkpoint(checkpoint)
    print(f"Resuming from {checkpoint}")
    return str(checkpoint)


def load_prompts(
    arguments: TrainArguments,
    split: str,
    seed: int = 0,
    processor: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> tuple[Dataset | IterableDataset, CleaningReport | None]:
    """
    Load one split in the form that TRL trains on.

    Args:
        arguments ([`TrainArguments`]):
            The settings of the data.
        split (`str`):
            Split, or a slice of it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the embedded data set.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The model's processor. `max_prompt_length` needs it.

    Returns:
        `tuple[Dataset | IterableDataset, CleaningReport | None]`: the prompts, and the report on their cleaning; the
        embedded data set has no report. Raises `ValueError` if the split or a column is missing, or no row is usable.
    """
    if arguments.dataset_name == EMBEDDED:
        n = arguments.embedded_problems if split == "train" else 512
        return to_prompts(make_problems(n, split=split, seed=seed)), None
    known = FORMAT_OF_HUB_ID.get(arguments.dataset_name)
    config = arguments.dataset_config
    if config is None and known is not None and not Path(arguments.dataset_name).exists():
        config = known.config
    rows, folders = load_rows(arguments.dataset_name, config, split, arguments.streaming)
    return clean_prompts(
        rows,
        _data_format(arguments, rows),
        prompt_template=arguments.prompt_template,
        conversational=arguments.conversational,
        limits=arguments.image_limits,
        folders=folders,
        processor=processor,
        max_prompt_length=arguments.max_prompt_length,
        allow_remote_images=arguments.allow_remote_images,
        strict=arguments.strict,
        name=split,
    )


def _data_format(arguments: TrainArguments, rows: Dataset | IterableDataset) -> DataFormat | None:
    """The format of the rows: the user's choice, otherwise from the hub id, otherwise from the columns."""
    if arguments.dataset_format is not None:
        return FORMATS[arguments.dataset_format]
    columns = rows.column_names or []
    if arguments.columns:
        return own_columns(columns, arguments.columns)
    if arguments.dataset_name in FORMAT_OF_HUB_ID:
        return FORMAT_OF_HUB_ID[arguments.dataset_name]
    return None if "prompt" in columns else own_columns(columns)


def _print_progress(progress) -> None:
    if progress.step % 20 == 0:
        print(f"warm start, step {progress.step}: reads {progress.reading_accuracy:.0%}, loss {progress.loss:.3f}")
