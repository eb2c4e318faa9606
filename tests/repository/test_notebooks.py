"""
The notebooks: stored without outputs, links and badges that fit, and those for a CPU run from top to bottom, where
cells tagged `check` assert what they should have found. The one for a GPU is run with a small model.
"""

import base64
import importlib.util
import re
import resource
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from filelock import FileLock
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from peft import PeftModel

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.cli.train import TrainArguments
from sapo_trl.embedded import WarmStartConfig, build_model, build_processor, make_problems, warm_start
from sapo_trl.presets import PRESETS


ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ON_GPU = ROOT / "notebooks" / "05_qwen2_5_vl_lora_colab.ipynb"
RUN_FILE = ROOT / "trainer_configs" / "geo3k_qwen2.5_vl_3b_sapo_lora_colab_t4.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Pictures that each shows.
PICTURES = {"01_quickstart": 2, "02_segments": 2, "03_compare_algorithms": 2, "04_your_own_data_and_reward": 0}
CPU_SECONDS = 300
"""Of a notebook, the warm start that three of them share included."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path, *without: str) -> list[NotebookNode]:
    """Cells with code, but for those with one of these tags."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    return [cell for cell in cells if not set(cell.metadata.get("tags", [])) & set(without)]


def tagged(path: Path, tag: str) -> str:
    """Source of the one cell with this tag."""
    [cell] = [cell for cell in code_cells(path) if tag in cell.metadata.get("tags", [])]
    return cell.source


def as_python(source: str) -> str:
    """Without the magic of IPython."""
    return TransformerManager().transform_cell(source)


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


# --------------------------------------------------------------------------------------------------------- as in git


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == [*PICTURES, ON_GPU.stem]


@every_notebook
def test_it_is_stored_without_outputs(path):
    """Otherwise: `jupyter nbconvert --clear-output --inplace notebooks/*.ipynb`."""
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert set(cell.metadata) <= {"tags"}, cell.source
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}


@every_notebook
def test_its_code_compiles(path):
    for cell in code_cells(path):
        compile(as_python(cell.source), f"{path.name}, {cell.id}", "exec")


@every_notebook
def test_only_papers_are_linked_elsewhere(path):
    """tests/repository/test_addresses.py follows the links to files."""
    for link in re.findall(r"\]\((https?:[^)\s]+)\)", prose(path)):
        assert re.match(r"https://huggingface\.co/papers/", link), link


@every_notebook
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("wheel", ["sapo_trl-0.1.0-py3-none-any.whl", None])
def test_the_install_cell(path, installed, wheel, tmp_path, monkeypatch):
    """It installs the wheel beside the notebook, or the checkout around it."""
    folder = tmp_path / "checkout" / "notebooks"
    folder.mkdir(parents=True)
    if wheel is not None:
        (folder / wheel).touch()
    monkeypatch.chdir(folder)
    commands, names = [], {}
    shell = SimpleNamespace(run_line_magic=lambda name, line: commands.append(f"{name} {line}"))
    found = importlib.util.find_spec("sapo_trl") if installed else None
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: found)
        exec(as_python(tagged(path, "install")), names | {"get_ipython": lambda: shell}, names)
    source = folder / wheel if wheel is not None else tmp_path / "checkout"
    # IPython itself puts the value in place of the name.
    assert [command.format(**names) for command in commands] == (
        [] if installed else [f'pip install -q "{source}[vlm]"']
    )
    assert "vlm" in PROJECT["optional-dependencies"]


def test_the_first_says_which_sapo_it_is():
    text = prose(NOTEBOOKS[0])
    assert "Soft Adaptive" in text and 'loss_type="sapo"' in text and "docs/name_clash.md" in text


def test_the_run_file_in_prose_has_known_settings():
    [block] = re.findall(
        r"```yaml\n(.*?)```", prose(ROOT / "notebooks" / "04_your_own_data_and_reward.ipynb"), re.DOTALL
    )
    known = {*SAPOConfig.__dataclass_fields__, *TrainArguments.__dataclass_fields__, "model_name_or_path"}
    assert set(yaml.safe_load(block)) <= known


# ---------------------------------------------------------------------------------------------------------- on a CPU


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory):
    """Where the notebooks find the model to start from, and the seconds of CPU that it took to make."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):  # of one of several processes: one of them makes it for all
        folder = folder.parent
    cache, spent = folder / "notebooks", folder / "notebooks-seconds"
    with FileLock(folder / "notebooks.lock"):
        if not spent.exists():
            started = time.process_time()
            warm_start(cache, WarmStartConfig())
            spent.write_text(str(time.process_time() - started))
    return cache, float(spent.read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the limit is on CPU time, below
@pytest.mark.parametrize("name", PICTURES)
def test_it_runs(name, request, tmp_path, monkeypatch):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    allowed = CPU_SECONDS
    if "warm_start" in "".join(cell.source for cell in code_cells(path)):
        cache, spent = request.getfixturevalue("warm_cache")
        monkeypatch.setenv("SAPO_TRL_CACHE", str(cache))
        allowed -= spent
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    (tmp_path / "run").mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "run")}}
    ).execute()  # raises what a cell raises
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 1 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < allowed

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("check" in cell.metadata.get("tags", []) for cell in cells) >= 2
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) == PICTURES[name]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 3_000 for picture in pictures)
    if name != "04_your_own_data_and_reward":
        # Responses with their segments, each token with its hint.
        html = "".join(data.get("text/html", "") for data in shown)
        assert len(re.findall(r'<span style="background:#\w{6};[^"]*" title="segment \d+', html)) > 100
    # Written where it was run, and nowhere else.
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= {"outputs"}


# ---------------------------------------------------------------------------------------------------------- on a GPU


def test_its_numbers_are_marked():
    marked = " ".join(prose(ON_GPU).split())
    assert "Not tried on a GPU yet" in marked and "neither memory nor time has been measured on a T4" in marked
    (row,) = re.findall(rf"\[{ON_GPU.stem}\].*", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert "not measured yet" in row


def test_the_colab_settings_are_those_of_the_run_file():
    run = yaml.safe_load(RUN_FILE.read_text(encoding="utf-8"))
    names: dict = {}
    exec(tagged(ON_GPU, "settings"), names)
    assert names["MODEL"] == run["model_name_or_path"]
    assert names["DATASET"] == run["dataset_name"]
    assert names["DTYPE"] == run["dtype"]
    assert names["PRECISION"] == {"fp16": run["fp16"]}

    exec(tagged(ON_GPU, "config"), names | {"PRECISION": {"use_cpu": True, "bf16": False}}, names)
    args, peft_config = names["args"], names["peft_config"]
    # A session is shorter than the run. `SAPOConfig` makes a list of `report_to`.
    elsewhere = {"output_dir", "max_steps", "save_steps", "fp16", "report_to"}
    compared = {name for name in run if name in SAPOConfig.__dataclass_fields__} - elsewhere
    assert len(compared) > 15
    for name in {*compared, *PRESETS["sapo"].settings}:
        assert getattr(args, name) == run.get(name, PRESETS["sapo"].settings.get(name)), name
    for name in ("r", "alpha", "dropout"):
        own = name if name == "r" else f"lora_{name}"
        assert getattr(peft_config, own) == run[f"lora_{name}"], name
    assert set(peft_config.target_modules) == set(run["lora_target_modules"])

    text = "".join(cell.source for cell in code_cells(ON_GPU))
    assert f'prompt_template="{run["prompt_template"]}"' in text
    assert f"ImageLimits(min_pixels={run['min_pixels']:_}, max_pixels={run['max_pixels']:_})" in text
    assert f"reward_funcs=[{', '.join(run['reward_funcs'])}]" in text


@pytest.mark.slow
def test_the_colab_notebook_trains_a_small_model(tmp_path, monkeypatch):
    """All of its cells but the installation and the search for a GPU, in order."""
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    make_problems(24).to_parquet(tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in code_cells(ON_GPU, "install", "gpu"):
        exec(compile(as_python(cell.source), cell.id, "exec"), names)
        if "settings" in cell.metadata.get("tags", []):
            substituted = {
                "MODEL": str(tmp_path / "model"),
                "DATASET": str(tmp_path / "train.parquet"),
                "ROLLOUTS": 1,
                "DTYPE": "float32",
                "PRECISION": {"use_cpu": True, "bf16": False},
            }
            assert substituted.keys() == {name for name in names if name.isupper()}
            names |= substituted

    trainer: SAPOTrainer = names["trainer"]
    assert isinstance(trainer.model, PeftModel)
    assert trainer.state.global_step == 4
    assert trainer.critic.module.mode == "adapter"
    assert len(names["log"]) == 1
    output = tmp_path / "outputs" / "qwen2.5-vl-3b-t4"
    assert (output / "adapter_model.safetensors").is_file()
    assert (output / "critic").is_dir()
    assert names["page"]["responses"] == 16
    assert (output / "view.html").is_file()
