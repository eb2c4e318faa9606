"""The command for a lent GPU: its order, its time limit, its results after each row, and its environment."""

import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 1024**3


@pytest.fixture(autouse=True)
def beside_one_another(monkeypatch):
    """The scripts and the package import one another by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def module(name):
    return import_module(f"on_gpu.{name}")


class Lab:
    """A folder for results, and rows of small scripts."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        self.machine = {"machine": "GPU", "versions": {"torch": "1"}, "on_gpu": True, "warnings": []}
        self.rows = []

    def row(self, name, code, **kwargs):
        """A row that runs Python code with the path of its result in `result`."""
        script = self.folder / f"{len(self.rows)}.py"
        script.write_text(f"import json, os, pathlib, sys, time\nresult = pathlib.Path(sys.argv[1])\n{code}\n")
        self.rows.append(module("row_list").Row(name, name, f"{script} {{folder}}/r.json", 1.0, **kwargs))
        return self.rows[-1]

    def answer(self, name, **numbers):
        """A row that counts its calls and writes these numbers."""
        code = f"open({str(self.folder / 'calls')!r}, 'a').write({name + ' '!r})"
        return self.row(name, f"{code}\nresult.write_text({json.dumps(json.dumps(numbers))})")

    def calls(self):
        file = self.folder / "calls"
        return file.read_text().split() if file.is_file() else []

    def run(self, seconds=60.0, retry=False, size="3b"):
        """Run all rows as the command does. Returns the names of rows that are left, and the report on the disk."""
        command, runner = module("command"), module("runner")
        report = command.load(self.out, self.machine, size, self.rows, retry)
        command.write(report, self.rows, self.out)
        left = runner.Runner(
            python=Path(sys.executable),
            report=report,
            size=size,
            deadline=time.monotonic() + seconds,
            log=self.out / "on_gpu.log",
            write=lambda found: command.write(found, self.rows, self.out),
        ).run(self.rows)
        return [row.name for row in left], json.loads((self.out / "on_gpu.json").read_text())


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class TestRows:
    def test_each_row_finds_the_results_of_the_rows_before(self, lab):
        seen = f"list(json.load(open({str(lab.out / 'on_gpu.json')!r}))['rows'])"
        for name in ("x/b", "x/a", "y/c"):
            lab.row(name, f"result.write_text(json.dumps({{'seen': {seen}}}))")
        left, report = lab.run()
        assert left == []
        assert [row["result"]["seen"] for row in report["rows"].values()] == [[], ["x/b"], ["x/b", "x/a"]]
        assert list(report["rows"]) == ["x/b", "x/a", "y/c"]

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            ("print('a'); raise ValueError('one | two')", "ValueError: one | two"),
            ("class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError('tried to get 9 GiB')", "out of memory"),
            ("os.kill(os.getpid(), 9)", "out of memory"),
            ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
            ("result.write_text(json.dumps({'error': 'out of memory'}))", "out of memory"),
            ("pass", "wrote no result"),
            ("result.write_text('{\"seco')", "wrote no result"),
        ],
    )
    def test_a_failed_row_is_reported_and_the_next_one_runs(self, lab, code, error):
        lab.row("x/bad", code)
        lab.answer("x/good", seconds=2)
        left, report = lab.run()
        assert left == []
        assert report["rows"]["x/bad"]["error"] == error and "result" not in report["rows"]["x/bad"]
        assert report["rows"]["x/good"]["result"] == {"seconds": 2}
        table = (lab.out / "on_gpu.md").read_text()
        assert f"| x/bad | {error.replace('|', ' ')} |" in table and "| x/good | seconds 2 |" in table

    def test_a_row_that_overruns_is_killed_with_its_own_processes(self, lab, monkeypatch):
        monkeypatch.setitem(module("runner").PATIENCE, "3b", 3)
        child = f"import os, time; open({str(lab.folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(500)"
        lab.row(
            "x/slow",
            f"import subprocess\nresult.write_text('{{\"lengths\": [1]}}')\n"
            f"subprocess.run([sys.executable, '-c', {child!r}])",
        )
        lab.answer("x/good")
        left, report = lab.run()
        slow = report["rows"]["x/slow"]
        assert slow["error"] == "stopped after 3 s" and slow["took"] == pytest.approx(3, abs=2)
        assert slow["result"] == {"lengths": [1]}  # its last complete result stays
        assert left == [] and lab.calls() == ["x/good"]
        pid = int((lab.folder / "pid").read_text())
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    def test_all_output_is_kept(self, lab):
        lab.row("x/a", "print('a line'); sys.exit('the reason')")
        lab.run()
        log = (lab.out / "on_gpu.log").read_text()
        assert "a line" in log and "the reason" in log and "x/a" in log


class TestTimeLimit:
    def test_a_row_that_would_not_fit_is_not_started(self, lab):
        lab.answer("x/long")
        lab.rows[0] = module("row_list").Row(**{**vars(lab.rows[0]), "seconds": 100.0})
        lab.answer("x/short")
        left, report = lab.run(seconds=50)
        assert left == ["x/long"] and lab.calls() == ["x/short"]
        assert "Not started: x/long." in (lab.out / "on_gpu.md").read_text()
        # With more time the same command measures it.
        left, report = lab.run(seconds=200)
        assert left == [] and lab.calls() == ["x/short", "x/long"]
        assert "Not started" not in (lab.out / "on_gpu.md").read_text()

    def test_a_row_that_the_limit_stops_runs_again(self, lab):
        marker = lab.folder / "second"
        lab.row("x/a", f"marker = pathlib.Path({str(marker)!r})\nmarker.exists() or time.sleep(500)\n"
                "result.write_text('{}')")  # fmt: skip
        started = time.monotonic()
        left, report = lab.run(seconds=2)
        assert time.monotonic() - started < 20
        assert left == ["x/a"] and report["rows"] == {} and report["cut_off"]["x/a"] == pytest.approx(2, abs=0.5)
        assert "Stopped after 2 s by the time limit: x/a." in (lab.out / "on_gpu.md").read_text()
        # It needs more than two seconds, so it is not started where there is less.
        left, report = lab.run(seconds=1.5)
        assert left == ["x/a"] and "x/a" in report["cut_off"]
        marker.touch()
        left, report = lab.run(seconds=60)
        assert left == [] and report["rows"]["x/a"]["result"] == {} and report["cut_off"] == {}

    def test_finished_rows_correct_the_guesses(self, lab):
        first, second = lab.answer("x/a"), lab.answer("x/b")
        runner = module("runner").Runner(
            Path(sys.executable), {"rows": {}, "cut_off": {}}, "3b", 0.0, lab.folder / "log", print
        )
        assert runner.expected(first) == 1
        runner.report["rows"]["x/a"] = {"took": 30.0, "expected": 10.0}
        assert runner.expected(second) == pytest.approx(3)
        # A failed row says nothing.
        runner.report["rows"]["x/c"] = {"took": 90.0, "expected": 1.0, "error": "out of memory"}
        assert runner.expected(second) == pytest.approx(3)


class TestContinuation:
    def test_finished_and_failed_rows_do_not_run_again(self, lab):
        lab.answer("x/a")
        lab.row("x/bad", f"open({str(lab.folder / 'calls')!r}, 'a').write('x/bad '); sys.exit(1)")
        lab.run()
        lab.answer("x/new")
        lab.run()
        assert lab.calls() == ["x/a", "x/bad", "x/new"]
        lab.run(retry=True)
        assert lab.calls() == ["x/a", "x/bad", "x/new", "x/bad"]

    def test_a_row_with_other_options_is_another_row(self, lab):
        row = lab.answer("x/a")
        lab.run()
        lab.rows[0] = module("row_list").Row(**{**vars(row), "command": row.command + " --more"})
        _, report = lab.run()
        assert lab.calls() == ["x/a", "x/a"] and report["rows"]["x/a"]["command"].endswith("--more")

    @pytest.mark.parametrize("change", ["machine", "versions", "size"])
    def test_results_of_another_machine_are_not_mixed_in(self, lab, change):
        lab.answer("x/a")
        lab.run()
        other = {"machine": "another GPU", "versions": {"torch": "2"}}.get(change)
        lab.machine = {**lab.machine, **({change: other} if other else {})}
        with pytest.raises(module("environment").UnfitMachine, match=f"another {change}.*--out"):
            lab.run(size="tiny" if change == "size" else "3b")
        assert lab.calls() == ["x/a"]


def cost_result(seconds, gib):
    responses = {"number": 16, "shortest": 1024, "longest": 1024}
    numbers = {"seconds": seconds, "fastest": seconds, "slowest": seconds + 1, "tokens_per_second": 5000.4}
    numbers |= {"peak_bytes": gib * GIB, "planned_bytes": 34 * GIB, "padding": 0.125, "prompt_tokens": 340}
    return numbers | {"responses": responses, "optimizer": "adamw_torch_fused"}


class TestTable:
    def report(self, **rows):
        report = {"machine": "GPU", "versions": {"torch": "2.11"}, "size": "3b", "warnings": ["w"], "cut_off": {}}
        listed = {row.name: row for row in module("row_list").ROWS}
        rows = {name.replace("__", "/"): found for name, found in rows.items()}
        rows = {name: {"title": listed[name].title, "took": 7.0, **found} for name, found in rows.items()}
        return module("table").as_markdown({**report, "rows": rows}, module("row_list").ROWS)

    def test_ratios_to_trl(self):
        text = self.report(
            equal__grpo={"result": cost_result(4, 32)},
            equal__sapo_ladder={"result": cost_result(5, 40)},
            equal__sapo_separate={"error": "out of memory"},
            equal__sapo_adapter={"result": cost_result(9, 12)},  # GRPO with LoRA was not measured
        )
        lines = text.splitlines()
        numbers = "5.00 to 6.00 | 5000 | 40.00 | 34.00 | 12.5% | TRL GRPO | **1.250** | **1.250** |"
        assert f'| SAPO, `critic="ladder"` | 5.00 | {numbers}' in lines
        assert '| SAPO, `critic="separate"` | out of memory |' + "  |" * 8 in lines
        adapter = next(line for line in lines if line.startswith('| SAPO, LoRA, `critic="adapter"`'))
        assert adapter.endswith("12.5% |  |  |  |")
        assert "GPU; torch 2.11." in text and "of 1,024 tokens to prompts of 340 tokens" in text
        assert "`adamw_torch_fused`" in text and "Warning: w." in text
        assert "Not started: tests/gpu, spread/grpo" in text
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 6 and len({line.count("|") for line in table}) == 1

    def test_stages_lengths_and_tests(self):
        profile = {"stages": {"everything else": 1.0, "policy, backward": 3.0}, "seconds_per_rollout": 4.0}
        text = self.report(
            tests__gpu={"result": {"passed": 9, "failed": 1, "skipped": 0, "first_failure": "t: E"}, "error": "exit"},
            profile__sapo_ladder={"result": profile},
            profile__grpo={"error": "ended by SIGSEGV"},
            lengths__sapo_ladder={
                "result": {"lengths": [512], "seconds": {"model": [2.0]}, "powers": {}},
                "error": "stopped after 99 s",
            },
        )
        assert "GPU tests: 9 passed, 1 failed, exit (7 s). First failure: t: E." in text
        assert "| policy, backward | 75.0% |\n| everything else | 25.0% |\n| seconds per rollout | 4.00 |" in text
        assert "- TRL GRPO: ended by SIGSEGV" in text
        assert "| model | 2.000 |  |" in text and "- stopped after 99 s" in text


class TestList:
    def test_the_most_important_rows_come_first(self):
        rows = module("row_list").ROWS
        names = [row.name for row in rows]
        assert len(set(names)) == len(names) > 20
        assert names[:3] == ["tests/gpu", "equal/grpo", "equal/sapo_ladder"]
        for row in rows:  # a ratio is known as soon as its row is there
            assert row.against is None or names.index(row.against) < names.index(row.name)
        tables = {row.table for row in rows}
        assert tables == {"tests", "equal", "spread", "profile", "lengths", "padding", "generation"}
        for lengths in ("equal", "spread"):
            update_cost = import_module("update_cost").ROWS
            assert {f"{lengths}/{name}" for name in update_cost} <= set(names)
            for row in rows:
                if row.table == lengths:
                    title, _, _, against = update_cost[row.name.split("/")[1]]
                    assert (row.title, row.against) == (title, against and f"{lengths}/{against}")

    @pytest.mark.parametrize("size", ["3b", "tiny"])
    def test_scripts_take_their_options(self, size):
        parsers = {name: import_module(name).parser for name in ("update_cost", "memory_and_speed", "padding")}
        parsers["profile_step"] = parsers["update_cost"]
        checked = 0
        for row in module("row_list").ROWS:
            script, *arguments = shlex.split(row.arguments(size))
            assert (BENCHMARKS / script).is_file()
            if (make := parsers.get(script.removesuffix(".py"))) is not None:
                options = make().parse_args(arguments)
                assert script == "padding.py" or options.size == size
                checked += 1
        assert checked > 20

    def test_names_on_the_command_line(self, capsys):
        command, rows = module("command"), module("row_list").ROWS
        assert [row.name for row in command.chosen(rows, ["lengths", "equal/grpo"])] == [
            "equal/grpo",
            "lengths/sapo_ladder",
        ]
        assert command.chosen(rows, None) == list(rows)
        for arguments, message in ((["--only", "equl"], "the tables are tests, equal"), (["--minutes", "0"], "got 0")):
            with pytest.raises(SystemExit):
                command.main(arguments)
            assert message in capsys.readouterr().err


# Packages beside PyTorch, transformers, PEFT and accelerate on a machine for which the wheels are collected.
ON_THE_MACHINE = set(
    "accelerate aiohttp filelock httpx huggingface-hub jinja2 markupsafe matplotlib mpmath numpy packaging pandas "
    "pillow psutil pyarrow pyyaml regex requests rich safetensors scipy sympy tokenizers torch tqdm transformers "
    "typer urllib3 xxhash".split()
)


def requirements(lines):
    """Names and pinned versions of a requirements file."""
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier) for each in parsed}


class TestWheels:
    def test_the_list_is_complete(self):
        """A requirement of this package or of a carried package is carried itself, or is on the machine."""
        carried = requirements((BENCHMARKS / "on_gpu" / "wheels.txt").read_text().splitlines())
        missing, checked = {}, 0
        for name in ("sapo_trl", *carried):
            for line in metadata.requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    checked += 1
                    if canonicalize_name(needed.name) not in carried.keys() | ON_THE_MACHINE:
                        missing[needed.name] = name
        assert missing == {} and checked > 40

    def test_each_wheel_has_one_version(self):
        carried = requirements((BENCHMARKS / "on_gpu" / "wheels.txt").read_text().splitlines())
        pinned = requirements((BENCHMARKS.parent / "constraints.txt").read_text().splitlines())
        versions = {name: version or pinned.get(name, "") for name, version in carried.items()}
        assert [name for name, version in versions.items() if not version.startswith("==")] == []
        assert not {name for name, version in carried.items() if version} & pinned.keys()  # one home for each pin

    def test_too_many_megabytes_are_refused(self, tmp_path, monkeypatch, capsys):
        collect_wheels = module("collect_wheels")
        make_wheel(tmp_path, "small")
        monkeypatch.setattr(collect_wheels, "collect", lambda folder, version: sorted(folder.glob("*.whl")))
        assert collect_wheels.main(["--folder", str(tmp_path)]) == 0
        assert "small-1.0-py3-none-any.whl" in capsys.readouterr().out
        monkeypatch.setattr(collect_wheels, "LIMIT_MB", 1e-4)
        assert collect_wheels.main(["--folder", str(tmp_path)]) == 1


def make_wheel(folder, name, *requirements):
    """A wheel with one module, which holds `here = True`."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "here = True\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


class TestEnvironment:
    @pytest.fixture
    def environment(self, monkeypatch):
        environment = module("environment")
        monkeypatch.setattr(environment, "WANTED", ("carried_here", "pytest"))
        return environment

    def test_without_wheels_this_python_runs_the_rows(self, environment, tmp_path):
        assert environment.prepare(tmp_path / "none", tmp_path / "env") == (Path(sys.executable), [])
        assert not (tmp_path / "env").exists()

    @pytest.mark.slow
    def test_wheels_are_added_to_the_packages_of_this_python(self, environment, tmp_path):
        make_wheel(tmp_path / "wheels", "carried_here", "pytest")
        python, warnings = environment.prepare(tmp_path / "wheels", tmp_path / "env")
        assert warnings == [] and python.is_relative_to(tmp_path)
        code = "import carried_here, pytest; print(carried_here.__file__, pytest.__file__)"
        printed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        assert Path(printed[0]).is_relative_to(tmp_path) and printed[1] == pytest.__file__
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
        # The second call finds it, and another folder of wheels makes it anew.
        stamp = (tmp_path / "env" / "made_from.json").stat().st_mtime_ns
        environment.prepare(tmp_path / "wheels", tmp_path / "env")
        assert (tmp_path / "env" / "made_from.json").stat().st_mtime_ns == stamp
        make_wheel(tmp_path / "wheels", "carried_too")
        environment.prepare(tmp_path / "wheels", tmp_path / "env")
        assert (tmp_path / "env" / "made_from.json").stat().st_mtime_ns != stamp

    @pytest.mark.slow
    def test_a_requirement_that_is_not_met_is_a_warning(self, environment, tmp_path):
        make_wheel(tmp_path / "wheels", "carried_here", "packaging>1000")
        python, warnings = environment.prepare(tmp_path / "wheels", tmp_path / "env")
        assert len(warnings) == 1 and "packaging>1000" in warnings[0]
        subprocess.run([python, "-c", "import carried_here"], check=True)

    @pytest.mark.slow
    def test_a_wheel_that_is_none(self, environment, tmp_path):
        (tmp_path / "wheels").mkdir()
        (tmp_path / "wheels" / "carried_here-1.0-py3-none-any.whl").write_text("no archive")
        with pytest.raises(environment.UnfitMachine, match="pip cannot install the wheels"):
            environment.prepare(tmp_path / "wheels", tmp_path / "env")

    def test_one_gpu_and_no_network(self, environment, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert environment.variables()["CUDA_VISIBLE_DEVICES"] == "0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        variables = environment.variables()
        assert variables["CUDA_VISIBLE_DEVICES"] == "3" and variables["HF_HUB_OFFLINE"] == "1"

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("raise ModuleNotFoundError(\"No module named 'trl'\")", "No module named 'trl'.*make gpu-wheels"),
            ('print(\'{"on_gpu": false, "no_gpu": "no driver"}\')', "PyTorch finds no GPU: no driver"),
            ("import time; time.sleep(500)", "did not answer within 1 seconds"),
        ],
    )
    def test_machines_that_cannot_run_the_rows(self, environment, tmp_path, monkeypatch, code, message):
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\n{code}\n")
        python.chmod(0o755)
        if "sleep" in code:
            monkeypatch.setattr(environment, "CHECK_SECONDS", 1)
        with pytest.raises(environment.UnfitMachine, match=message):
            environment.check(python, needs_gpu=True)


@pytest.mark.slow
def test_the_command_at_tiny_size(tmp_path):
    """Real rows. The limit is too short at first; then the same command continues."""
    arguments = [sys.executable, str(BENCHMARKS / "on_gpu"), "--size", "tiny", "--out", str(tmp_path / "out")]
    arguments += ["--wheels", str(tmp_path / "none"), "--only", "tests", "equal/grpo", "equal/sapo_shared"]
    call = {"capture_output": True, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 800}
    short = subprocess.run([*arguments, "--minutes", "0.1"], **call)
    assert short.returncode == 0, short.stderr
    assert "Rows left: 3 of 3" in short.stdout
    assert json.loads((tmp_path / "out" / "on_gpu.json").read_text())["rows"] == {}

    long = subprocess.run([*arguments, "--minutes", "12"], **call)
    assert long.returncode == 0, long.stdout + long.stderr
    report = json.loads((tmp_path / "out" / "on_gpu.json").read_text())
    assert list(report["rows"]) == ["tests/gpu", "equal/grpo", "equal/sapo_shared"]
    trl, ours = (report["rows"][f"equal/{name}"]["result"] for name in ("grpo", "sapo_shared"))
    ratio = ours["seconds"] / trl["seconds"]
    assert f"| TRL GRPO | **{ratio:.3f}** |" in (tmp_path / "out" / "on_gpu.md").read_text()
    assert trl["responses"] == {"number": 4, "shortest": 32, "longest": 32} and trl["padding"] == 0
    assert trl["tokens_per_second"] == pytest.approx(4 * (32 + trl["prompt_tokens"]) / trl["seconds"])
    if not report["on_gpu"]:
        assert report["rows"]["tests/gpu"]["result"]["passed"] == 0 < report["rows"]["tests/gpu"]["result"]["skipped"]
