"""Run files by name: in a checkout and beside an installed wheel."""

from pathlib import Path

import pytest
from trl import ModelConfig

from sapo_trl import SAPOConfig, run_files
from sapo_trl.cli import main
from sapo_trl.cli.run_arguments import parse_run
from sapo_trl.cli.train import TrainArguments
from sapo_trl.run_files import find_run_file, run_file_names


ROOT = Path(__file__).parents[2]
CHECKOUT = ROOT / "trainer_configs"


def test_names_are_the_files():
    files = {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.rglob("*.yaml")}
    assert {f"{name}.yaml" for name in run_file_names()} == files
    assert {"embedded", "accelerate/zero3_8gpu", "algorithms/ppo", "study/quick"} <= set(run_file_names())


@pytest.mark.parametrize("name", ["embedded", "embedded.yaml", "trainer_configs/embedded.yaml"])
def test_a_name_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run_file(name).read_bytes() == (CHECKOUT / "embedded.yaml").read_bytes()


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("embedded").write_text("max_steps: 1\n")
    assert find_run_file("embedded").read_text() == "max_steps: 1\n"


def test_a_mistyped_name_gets_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"'embeded'\. Did you mean `embedded`\? `sapo-trl configs` lists"):
        find_run_file("embeded")


def test_an_installed_package_has_the_folder_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "_PACKAGE", tmp_path)
    (tmp_path / "trainer_configs" / "study").mkdir(parents=True)
    (tmp_path / "trainer_configs" / "study" / "mine.yaml").touch()
    assert run_file_names() == ["study/mine"]


class TestCommand:
    def test_lists(self, capsys):
        assert main(["configs"]) == 0
        assert capsys.readouterr().out.splitlines() == run_file_names()

    def test_prints(self, capsys):
        assert main(["configs", "algorithms/ppo"]) == 0
        assert capsys.readouterr().out.rstrip() == (CHECKOUT / "algorithms/ppo.yaml").read_text().rstrip()

    def test_copies(self, tmp_path, capsys):
        assert main(["configs", "embedded", "study/quick", "--copy_to", str(tmp_path)]) == 0
        for name in ("embedded.yaml", "study/quick.yaml"):
            assert (tmp_path / name).read_bytes() == (CHECKOUT / name).read_bytes()
        assert capsys.readouterr().out.splitlines() == [
            str(tmp_path / "embedded.yaml"),
            str(tmp_path / "study/quick.yaml"),
        ]

    def test_overwrites_nothing(self, tmp_path, capsys):
        (tmp_path / "study").mkdir()
        (tmp_path / "study" / "quick.yaml").write_text("mine")
        assert main(["configs", "embedded", "study/quick", "--copy_to", str(tmp_path)]) == 2
        assert "exists already; nothing was copied" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*.yaml")] == ["quick.yaml"]

    def test_an_unknown_name(self, capsys):
        assert main(["configs", "algorithms/pppo"]) == 2
        assert "Did you mean `algorithms/ppo`?" in capsys.readouterr().err


def test_a_launch_file_of_the_package_is_found_by_name(capsys):
    classes = (TrainArguments, SAPOConfig, ModelConfig)
    request = parse_run(["--config", "embedded", "--accelerate_config", "accelerate/ddp_8gpu"], *classes)
    assert str(CHECKOUT / "accelerate" / "ddp_8gpu.yaml") in request.launch
