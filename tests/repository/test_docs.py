"""
README and `docs/`: links lead somewhere, code runs, commands exist, generated pages are up to date.

A Python block is run with the others of its page, in order, in an empty folder. One that is not says why in a comment
above it, `<!-- not run: … -->`, or which test runs it, `<!-- run by tests/… -->`; it is compiled and its imports are
followed all the same. A YAML block holds settings of `sapo-trl train`, or says what it is: `<!-- not settings: … -->`.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import typing
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import torch
import trl
import yaml

from docs.generate.config_table import DOCUMENT, described, markdown_tables, own_fields
from sapo_trl import SAPOConfig
from sapo_trl.cli import main
from sapo_trl.cli.run_arguments import short_help
from sapo_trl.cli.train import TrainArguments
from sapo_trl.cli.train_command import HELP
from sapo_trl.embedded import build_tokenizer
from sapo_trl.metric_names import OLD_NAMES
from sapo_trl.rollouts.types import RolloutBatch


ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"^(?:<!-- (?P<comment>[^\n]*?) -->\n+)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclasses.dataclass
class Block:
    page: Path
    comment: str
    kind: str
    text: str


@cache
def blocks(page: Path) -> list[Block]:
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["comment"] or "", match["kind"], match["text"]) for match in matches]


def blocks_of(*kinds: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.kind in kinds]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def test_every_block_is_seen():
    """Indented or unclosed ones would go unchecked."""
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), page_name(page)


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Those that GitHub and the site agree on."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        kept = re.sub(r"[^\w\s-]", "", text).strip().lower()
        ascii_only = unicodedata.normalize("NFKD", kept).encode("ascii", "ignore").decode()
        if kept.replace(" ", "-") == re.sub(r"[-\s]+", "-", ascii_only):
            found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


# -------------------------------------------------------------------------------------------------------------- python


def given(page: Path) -> dict[str, object]:
    """What a page's code takes as given."""
    if page.name != "README.md":
        return {}
    generator = torch.Generator().manual_seed(0)
    names = ("entropies", "rewards", "values", "old_logps")
    tensors = {name: torch.rand(2, 12, generator=generator) for name in names}
    learned = {name: torch.rand(2, 12, generator=generator).requires_grad_() for name in ("logps", "value_preds")}
    return {**tensors, **learned, "mask": torch.ones(2, 12, dtype=torch.bool)}


def run_page(page: Path) -> str:
    """Run a page's Python in the current folder; returns what it prints."""
    names, printed = given(page), io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(block for block in blocks(page) if block.kind == "python"):
            if not block.comment:
                exec(compile(block.text, f"{page_name(page)}, block {number}", "exec"), names)
    return printed.getvalue()


def has_code_to_run(page: Path) -> bool:
    return any(block.kind == "python" and not block.comment for block in blocks(page))


# What a machine without a GPU refuses about settings for one is no mistake of the page.
@pytest.fixture
def settings_for_a_gpu_are_accepted(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("page", filter(has_code_to_run, PAGES), ids=page_name)
def test_python_runs(page, tmp_path, monkeypatch, settings_for_a_gpu_are_accepted):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("block", [b for b in blocks_of("python") if b.comment], ids=lambda b: page_name(b.page))
def test_python_that_is_not_run_says_why(block):
    reason = re.fullmatch(r"not run: \S.*|run by (?P<test>tests/[\w/]+\.py)", block.comment)
    assert reason, block.comment
    if reason["test"]:
        assert block.page.name in (ROOT / reason["test"]).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


# ---------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=lambda block: page_name(block.page))
def test_yaml_has_known_settings(block):
    settings = yaml.safe_load(block.text)
    if not block.comment.startswith("not settings: "):
        classes = (TrainArguments, SAPOConfig, trl.ModelConfig)
        assert settings.keys() - {"preset", "env"} <= {
            setting.name for cls in classes for setting in dataclasses.fields(cls)
        }


# ------------------------------------------------------------------------------------------------------------ commands


@cache
def help_of(words: tuple[str, ...]) -> str:
    """What a command of `sapo-trl` says about itself. Fails if there is no such command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main([*words, "--help_all" if words in (("train",), ("eval",)) else "--help"])
    assert stopped.value.code == 0, words
    return printed.getvalue()


def commands() -> list[tuple[str, str]]:
    """Page and command line, of blocks and of code within sentences."""
    found = []
    for page in PAGES:
        lines = "".join(block.text for block in blocks(page) if block.kind == "bash").replace("\\\n", " ").splitlines()
        lines += [code.replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", prose(page))]
        found += [(page_name(page), line) for line in lines if line.strip()]
    return found


SAPO_TRL = [
    (page, after)
    for page, line in commands()
    for after in re.findall(r"(?:^\s*sapo-trl|-m sapo_trl\.cli) +([a-z].*)", line)
]


@pytest.mark.parametrize(("page", "line"), SAPO_TRL, ids=lambda text: text[:60])
def test_commands_of_ours(page, line):
    arguments = [word.strip("[]|…") for word in shlex.split(line.split("#")[0])]
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    words = []
    for word in arguments:
        if re.fullmatch(r"[a-z][a-z_-]*", word) is None:
            break
        words.append(word)
    text = help_of(tuple(words))
    if words == ["plan"] or (words == ["eval"] and "--config" in options):  # passes on what it does not know
        text += help_of(("train",))
    assert set(options) <= {"--help", *re.findall(r"--[\w-]+", text)}
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag == "--config" and value.startswith("trainer_configs/"):
            assert (ROOT / value).is_file(), value


def test_other_commands():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page, line in commands():
        made = re.match(r"\s*make ([a-z][a-z-]*)", line)
        assert not made or made[1] in targets, (page, line)
        ran = re.match(r"\s*(?:\S*/)?python (?:-m (sapo_trl[\w.]*)|(\w\S*\.py))", line)
        if ran and ran[1]:
            assert importlib.util.find_spec(ran[1]), (page, line)
        elif ran:
            assert (ROOT / ran[2]).is_file(), (page, line)


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_tables_of_settings_are_up_to_date():
    """Otherwise: `python -m docs.generate.config_table`."""
    assert markdown_tables() in (ROOT / DOCUMENT).read_text(encoding="utf-8")


def test_the_help_of_train_is_up_to_date():
    """Otherwise: `python -m docs.generate.config_table`."""
    assert HELP.read_text(encoding="utf-8") == short_help(TrainArguments, SAPOConfig, trl.ModelConfig) + "\n"


def test_the_tables_have_every_setting():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / DOCUMENT).read_text(encoding="utf-8"), re.MULTILINE)
    train = [setting.name for setting in dataclasses.fields(TrainArguments)]
    assert len(rows) == len(set(rows))
    assert set(rows) == {*own_fields(SAPOConfig), *train} | {"loss_type", "importance_sampling_level"}
    assert {"segmentation", "critic", "beta"} <= set(rows)
    assert not {"top_p", "max_steps"} & set(rows)


def test_descriptions_are_those_of_the_docstring():
    docstring = (
        "    Parameters:\n        > Parameters that control a\n\n        one (`int`):\n            First,\n"
        "            continued.\n\n        > Parameters that control b\n\n        two (`str`, *optional*):\n"
        "            Second.\n"
    )
    assert described(docstring) == {"a": {"one": "First, continued."}, "b": {"two": "Second."}}


# ------------------------------------------------------------------------------------------------------------- metrics


METRICS = ROOT / "docs" / "metrics.md"
# Not about a training run: their own commands document them.
ELSEWHERE = (
    "study",
    "analysis",
    "evaluation",
    "planner",
    "embedded",
    "recipes",
    "viewer",
    "data",
    "cli",
)


def documented() -> set[str]:
    """Every metric that has a row or a sentence."""
    text = re.sub(r"`(\w+)/(\w+)`((?:, `/\w+`)+)", _spelled_out, prose(METRICS))
    return set(re.findall(r"`([a-z_]+(?:/(?:[a-z_]+|<function>))*)`", text))


def _spelled_out(match: re.Match) -> str:
    """`a/b`, `/c` means `a/b`, `a/c`."""
    return f"`{match[1]}/{match[2]}`" + re.sub(r"`/(\w+)`", rf"`{match[1]}/\1`", match[3])


def sources() -> dict[Path, ast.Module]:
    files = (file for file in (ROOT / "sapo_trl").rglob("*.py") if file.relative_to(ROOT).parts[1] not in ELSEWHERE)
    files = (file for file in files if file.name != "metric_names.py")  # logs nothing
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def logged_in_the_code() -> set[str]:
    """Names that are added to the log as they stand, and strings that look like one."""
    names = set()
    for tree in sources().values():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                if node.func.attr in ("add_mean", "add_total", "add_max") and isinstance(first, ast.Constant):
                    names.add(first.value)
            if isinstance(node, ast.AnnAssign) and getattr(node.annotation, "id", None) == "Measurements":
                names |= {
                    key.value
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Dict)
                    for key in inner.keys
                    if isinstance(key, ast.Constant)
                }
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "metrics":
                if isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
                    names.add(node.slice.value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                if re.fullmatch(r"(?!image|application|text)[a-z_]+(/[a-z_0-9]+)+", node.value):
                    names.add(node.value)
    return names


def test_every_metric_of_a_run_is_documented(tmp_path, monkeypatch):
    """The page's own example prints them."""
    monkeypatch.chdir(tmp_path)
    names = set(run_page(METRICS).split())
    names = {name for name in names if re.fullmatch(r"[a-z_]+(/\w+)*", name)} - {"step", *OLD_NAMES}
    assert {"reward", "critic/explained_variance", "segments/count", "clip_ratio/dual_mean"} <= names
    generic = {re.sub(r"^rewards/\w+/", "rewards/<function>/", name) for name in names}
    assert generic <= documented()


def test_every_metric_in_the_code_is_documented():
    logged = logged_in_the_code()
    assert {
        "kl",
        "policy_loss",
        "skipped_steps",
        "ratio/max",
        "segments/single_token_share",
        "role/visual_dependency",
    } <= logged
    assert logged <= documented()


def test_every_documented_metric_is_in_the_code():
    ours = "".join(file.read_text(encoding="utf-8") for file in sources())
    theirs = "".join(
        Path(module.__file__).read_text(encoding="utf-8")
        for module in map(importlib.import_module, ("trl.trainer.grpo_trainer", "transformers.trainer"))
    )
    rows = re.findall(r"^\| (`[^|]*`) \|", prose(METRICS), re.MULTILINE)
    assert len(rows) > 50
    for name in re.findall(r"`([^`]+)`", "".join(rows)):
        first, _, rest = name.partition("/")
        literal = f'"{name}"' in ours + theirs
        composed = f'f"{first}/{{' in ours + theirs and f'{rest.split("/")[-1]}"' in ours + theirs
        group = name.rpartition("/")[0]
        composed |= f'f"{group}/{{' in ours and f'"{name.removeprefix(group)[1:]}"' in ours
        assert literal or composed, name


# ------------------------------------------------------------------------------------------------------ pictures, site


def drawing_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    return drawing


def test_the_picture_of_a_step_has_the_stages_of_its_page():
    drawing = drawing_of("draw_step")
    numbers = [text.split()[0] for text, *_ in drawing.ROLLOUT + drawing.STEP]
    headings = re.findall(r"(?m)^### (\d+) ", (ROOT / "docs" / "how_a_step_runs.md").read_text(encoding="utf-8"))
    assert numbers == headings == [str(number) for number in range(1, 13)]


def test_the_pictures_of_the_concepts_can_be_drawn(tmp_path):
    drawing = drawing_of("draw_concepts")
    segments = drawing.segments_of_the_example()
    ends = [drawing.TOKENS[i] for i in segments.is_last[0].nonzero().flatten().tolist()]
    assert ends == ["legs", "3", "So", "3", "+", "."]  # what the page says about them
    assert segments.count.item() == 6
    for name in ("units", "credit", "ratios"):
        getattr(drawing, f"draw_{name}")(tmp_path / f"{name}.png")
        assert (ROOT / "docs" / "images" / f"concept_{name}.png").is_file()
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_the_kinds_of_tokens_of_a_solution():
    """Of the picture about the dependence on images; and its comparison of two samples, against all pairs."""
    spec = importlib.util.spec_from_file_location("draw_sight", ROOT / "docs" / "draw_visual_dependency.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    tokenizer = build_tokenizer()
    ids = tokenizer("AB=7\nBC=3\n7+3=10\n10-3=7\n\\boxed{7}<|im_end|>")["input_ids"]
    pieces = [tokenizer.decode([token]) for token in ids]
    by_kind = dict.fromkeys(drawing.KINDS, "")
    for piece, kind in zip(pieces, drawing.kinds_of(pieces), strict=True):
        by_kind[kind] += piece
    assert list(by_kind.values()) == ["73", "AB=\nBC=\n", "73103", "107", "+=\n-=\n", "\\boxed{7}<|im_end|>"]
    one, other = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in one.tolist() for b in other.tolist()]
    assert drawing.probability_of_more(one, other) == pytest.approx(sum(pairs) / 6)
    assert (ROOT / "docs" / "images" / "visual_dependency.png").is_file()


# ----------------------------------------------------------------------------------------------------- how a step runs


HOW_A_STEP_RUNS = ROOT / "docs" / "how_a_step_runs.md"
PACKAGE = ROOT / "sapo_trl"
# Each model family has some of them; the table has Qwen's.
OTHER_IMAGE_INPUTS = {
    "num_tiles",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "token_type_ids",
}


def named_files() -> set[str]:
    """The files and folders of the package that the page names, a folder with its slash."""
    names = set(re.findall(r"`((?:\w+/)*(?:\w+\.py|\w+/))`", prose(HOW_A_STEP_RUNS)))
    beside = {"sapo_trl/", "trainer_configs/", "examples/", "benchmarks/", "notebooks/", "docs/", "tests/"}
    return {name for name in names - beside if not name.startswith("docs/")}


def steps_and_rest() -> tuple[str, str]:
    steps, rest = prose(HOW_A_STEP_RUNS).split("## The rest of the package")
    return steps, rest


def test_every_module_is_on_the_page_about_a_step():
    """A file of a step stands at its stage, any other file in the last table, by its name or its folder's."""
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    folders = tuple(re.findall(r"`(\w+/)`", steps_and_rest()[1]))
    assert not {name for name in modules - named_files() if not name.startswith(folders)}
    assert not {"trainer/", "critic/", "rollouts/", "segmentation/", "callbacks/"} & set(folders)


def test_every_file_on_the_page_about_a_step_exists():
    steps, rest = steps_and_rest()
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)`", steps)) | set(re.findall(r"^\| `(\w+\.py)`", rest, re.MULTILINE))
    assert len(names) > 50
    assert not {name for name in names if not (PACKAGE / name).is_file()}


def test_every_file_on_the_page_about_a_step_has_its_first_name():
    """`| file | first name …` is not a row about another file."""
    rows = re.findall(r"^\| (`[^|]*\.py`) \| ([^|]*) \|$", steps_and_rest()[0], re.MULTILINE)
    assert len(rows) > 40
    for cell, part in rows:
        code = "".join((PACKAGE / name).read_text(encoding="utf-8") for name in re.findall(r"`([^`]+)`", cell))
        names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", part)
        if names:
            assert names[0].split(".")[-1] in code, (cell, names[0])


def test_the_files_of_a_new_part_hold_the_names_of_its_row():
    """In CONTRIBUTING's table a row names files, then the functions or lists in them that have to change."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Where does it go?") : text.index("## Versions")]
    rows = re.findall(r"^\| \w[^|]* \| (`.*) \|$|^\| \w[^|]* \| ([a-z].*) \|$", table, re.MULTILINE)
    assert len(rows) > 15
    for row in map("".join, rows):
        files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", row)) - {"command.py"}  # each command has one
        assert not {name for name in files if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()}
        code = "".join((PACKAGE / name).read_text(encoding="utf-8") for name in files if (PACKAGE / name).is_file())
        folders = re.findall(r"`((?:\w+/)+)`", row)
        assert not {name for name in folders if not (PACKAGE / name).is_dir()}
        names = set(re.findall(r"`([A-Za-z]\w*)`", row)) - {"eval", "train", "GRPOConfig", "parts"}
        assert not {name for name in names if not re.search(rf"\b{name}\b", code)}, row


def test_the_table_of_a_batch_has_every_field():
    table = steps_and_rest()[0].split("## The fields of a batch")[1]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    fields = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert fields == RolloutBatch.__annotations__.keys() - OTHER_IMAGE_INPUTS


def test_the_table_of_critics_has_every_critic():
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("| `critic` |")[1].split("\n\n")[0]
    assert set(re.findall(r'^\| `"(\w+)"` \|', table, re.MULTILINE)) == set(
        typing.get_args(typing.get_type_hints(SAPOConfig)["critic"])
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert")),
    reason="the extra `docs` is not installed; `make docs` does that",
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        if page.parent.name == "docs":
            assert (tmp_path / ("" if page.stem == "index" else page.stem) / "index.html").is_file()
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("SAPOTrainer", "SegmentValueHead", "entropy_segments", "segment_gae", "accuracy_reward", "Benchmark"):
        assert f".{name}" in api, name
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (tmp_path / "notebooks" / notebook.stem / "index.html").read_text(encoding="utf-8")
        assert "find_spec" in page  # of the cell that installs the package
    # Links out of `docs/` became pages.
    assert "geometric_bias" in (tmp_path / "source" / "sapo_trl" / "losses.py" / "index.html").read_text("utf-8")
