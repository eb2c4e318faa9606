"""The home of a setting: its type is checked, its text is its help, and the documented default is the code's."""

import ast
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, TrlParser

import sapo_trl
from sapo_trl import SAPOConfig
from sapo_trl.cli.run_arguments import MOST_USED
from sapo_trl.cli.train import TrainArguments
from sapo_trl.data import FORMATS
from sapo_trl.evaluation.settings import EvalArguments
from sapo_trl.recipes import DPOPConfig, ReSTEMConfig
from sapo_trl.recipes.sampling import SamplingConfig
from sapo_trl.settings import (
    Bounds,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    UnitInterval,
    check_setting,
    check_settings,
    first_sentence,
    help_from_docstring,
    parameter_texts,
)


OWN = (SAPOConfig, TrainArguments, EvalArguments, SamplingConfig, ReSTEMConfig, DPOPConfig)


# -------------------------------------------------------------------------------------------------------------- checks


class TestChecks:
    @pytest.mark.parametrize(
        ("hint", "good", "bad", "message"),
        [
            (PositiveInt, [1, 7], [0, -1], "`x` must be at least 1, got "),
            (PositiveFloat, [1e-9, 2, math.inf], [0.0, -1.0, math.nan], "`x` must be positive, got "),
            (PositiveFloat | None, [None, 1.0], [0.0], "`x` must be positive (or `None`), got 0.0."),
            (Annotated[float, Bounds(gt=1)], [1.1], [1.0], "`x` must be greater than 1, got 1.0."),
            (UnitInterval, [0, 0.5, 1], [-0.1, 1.1, math.nan], "`x` must lie in [0, 1], got "),
            (Probability, [0.1, 1], [0.0, 90], "`x` must lie in (0, 1], got "),
            (Probability, [1.0], [90], "`x` must lie in (0, 1], got 90. It is a probability."),
            (Annotated[float, Bounds(ge=0, lt=math.inf)], [0.0], [math.inf, -1], "`x` must lie in [0, inf), got "),
            (Annotated[float, Bounds(le=1)], [-5, 1], [1.1, math.nan], "`x` must lie in (-inf, 1], got "),
            (FiniteFloat, [-1e300, 0], [math.inf, -math.inf, math.nan], "`x` must be finite, got "),
            (PositiveFloat, [1.0], ["0.5", None, True, [1.0]], "`x` must be a number, got "),
            (PositiveInt | None, [2, None], [2.5], "`x` must be a whole number (or `None`), got 2.5."),
            (PositiveInt, [2], ["8"], "`x` must be a whole number, got '8'."),
            (Literal["end", "start"], ["end"], [None, ["end"]], "`x` must be one of ('end', 'start'), got "),
            (Literal["end", "start"] | None, [None], ["ends"], "got 'ends'. Did you mean `end`?"),
        ],
    )
    def test_a_value_is_checked_against_its_type(self, hint, good, bad, message):
        for value in good:
            check_setting("x", value, hint)
        for value in bad:
            with pytest.raises(ValueError, match=re.escape(message)):
                check_setting("x", value, hint)

    @given(st.floats(allow_nan=False), st.floats(-5, 5), st.floats(-5, 5), st.booleans(), st.booleans(), st.booleans())
    def test_a_range_is_the_interval_that_its_error_names(self, value, low, high, has_high, open_low, open_high):
        """The written interval, read again by its brackets, contains the same numbers."""
        bounds = Bounds(
            **{"gt" if open_low else "ge": low, **({"lt" if open_high else "le": high} if has_high else {})}
        )
        inside = value > low if open_low else value >= low
        if has_high:
            inside &= value < high if open_high else value <= high
            assert str(bounds) == f"lie in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        assert (value in bounds) == inside
        assert math.nan not in bounds

    def test_all_settings_of_a_class_and_of_its_parents_are_checked(self):
        @dataclass
        class Parent:
            share: UnitInterval = 0.5
            anything: str | Literal[False] | None = None  # a list of values that is none
            free: int = -3

        @dataclass
        class Child(Parent):
            cut: Literal["end", "start"] | None = None

        check_settings(Child(anything="any text"))
        with pytest.raises(ValueError, match="`share` must lie in"):
            check_settings(Child(share=2.0))
        with pytest.raises(ValueError, match="`cut` must be one of"):
            check_settings(Child(cut="middle"))

    def test_trls_own_settings_stay_free(self, tmp_path):
        config = SAPOConfig(str(tmp_path), use_cpu=True, bf16=False, trackio_static_space_id="me/space", top_k=0)
        assert config.trackio_static_space_id == "me/space"


class TestCommandLine:
    def test_a_choice_has_the_literals_values_and_nothing_else(self, capsys):
        parser = TrlParser((TrainArguments, SAPOConfig, ModelConfig))
        choices = {action.dest: action.choices for action in parser._actions}
        hints = get_type_hints(SAPOConfig)
        assert choices["critic"] == get_args(hints["critic"]) and "tree" in choices["critic"]
        assert choices["loss_type"] == get_args(hints["loss_type"]) and "sapo" not in choices["loss_type"]
        assert "segment_clip" in choices["loss_type"] and "dapo" in choices["loss_type"]
        assert choices["kl_aggregation"] == choices["loss_aggregation"]
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--critic", "both"])
        assert "argument --critic: invalid choice: 'both'" in capsys.readouterr().err

    def test_yaml_and_command_line_give_the_declared_types(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(
            f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nkl_placement: loss\nkl_estimator: k3\n"
            "critic_learning_rate: 1e-5\nkl_aggregation: null\nadvantage_clamp: null\ntop_percent: 20\n"
        )
        line = ["--config", str(path), "--num_cuts", "3", "--critic_lam", "1", "--loss_aggregation", "token-mean"]
        (config,) = TrlParser(SAPOConfig).parse_args_and_config([*line, "--tree_widths", "2", "3"])
        # YAML reads `1e-5` as text.
        assert config.critic_learning_rate == 1e-5 and config.kl_aggregation is None
        assert (config.num_cuts, config.critic_lam, config.advantage_clamp) == (3, 1.0, None)
        assert config.tree_widths == [2, 3]


# --------------------------------------------------------------------------------------------------------------- texts


class TestTexts:
    def test_each_parameter_has_its_text(self):
        docstring = """
        Summary.

        Args:
            > Parameters that control a

            one (`int`, *optional*, defaults to `1`):
                First sentence. Second,
                with one (`int`): in it.
            two ([`~a.B`] or `str`): On the line.

        Returns:
            `int`
        """
        texts = {"one": "First sentence. Second, with one (`int`): in it.", "two": "On the line."}
        assert parameter_texts(docstring) == texts
        assert parameter_texts(inspect.cleandoc(docstring)) == texts  # as Python 3.13 stores it

    @pytest.mark.parametrize(
        ("text", "first"),
        [
            ("Only one.", "Only one"),
            ("A file `a.b`, in (0, 1]. More.", "A file `a.b`, in (0, 1]"),
            ("The loss of DPO. More. And more.", "The loss of DPO"),
            ("At 1.5 or `x`. More.", "At 1.5 or `x`"),
        ],
    )
    def test_first_sentence(self, text, first):
        assert first_sentence(text) == first

    def test_the_help_is_the_first_sentence_of_a_classs_own_parameters(self):
        @dataclass
        class Parent:
            inherited: int = field(default=1, metadata={"help": "The parent's."})

        @help_from_docstring
        @dataclass
        class Child(Parent):
            """
            Args:
                cut (`str`):
                    5 % at the `"end"`. Not shown.
                inherited (`int`):
                    Not the parent's.
            """

            cut: str = field(default="end", metadata={"aliases": ["-c"]})
            undocumented: int = 0

        by_name = {setting.name: dict(setting.metadata) for setting in dataclasses.fields(Child)}
        assert by_name == {
            "inherited": {"help": "The parent's."},
            "cut": {"aliases": ["-c"], "help": "5 %% at the 'end'"},
            "undocumented": {},
        }
        assert "5 % at the 'end'" in HfArgumentParser(Child).format_help()

    def test_a_class_without_docstring_keeps_its_fields(self):
        """As all classes under `python -OO`."""

        @dataclass
        class Bare:
            x: int = 1

        Bare.__doc__ = None
        assert help_from_docstring(Bare) is Bare and not dataclasses.fields(Bare)[0].metadata

    @pytest.mark.parametrize("config", OWN, ids=lambda config: config.__name__)
    def test_each_setting_has_one_short_text(self, config):
        texts = parameter_texts(config.__doc__)
        declared = [f for f in dataclasses.fields(config) if f.name in inspect.get_annotations(config)]
        assert declared
        for setting in declared:
            shown = setting.metadata["help"]
            assert 0 < len(shown) <= 110 and "[`" not in shown and "\n" not in shown, setting.name
            # A text is in the docstring, or, for a default that differs from TRL's, beside the field.
            inherited = setting.name in {f.name for base in config.__mro__[1:-1] for f in _fields(base)}
            assert setting.name in texts or inherited, setting.name

    def test_formats_are_named_in_the_help(self):
        shown = {f.name: f.metadata["help"] for f in dataclasses.fields(TrainArguments)}["dataset_format"]
        assert set(re.findall(r"`(\w+)`", shown)) == set(FORMATS)

    def test_segmentations_are_named_in_the_help(self):
        shown = SAPOConfig.__dataclass_fields__["segmentation"].metadata["help"]
        assert tuple(re.findall(r"`(\w+)`", shown)) == get_args(get_type_hints(SAPOConfig)["segmentation"])

    def test_settings_of_the_short_help_exist(self):
        names = {f.name for kind in (SAPOConfig, ModelConfig) for f in dataclasses.fields(kind)}
        assert {name for section in MOST_USED.values() for name in section} <= names


# ------------------------------------------------------------------------------------------------ documented defaults


_DEFAULT = re.compile(r"(\w+(?:, \w+)*) \((?:`[^`]*`|[^`()])*, defaults to `([^`]*)`\)")


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _defaults(documented: type | object) -> dict[str, object]:
    if inspect.isclass(documented) and dataclasses.is_dataclass(documented):
        return {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(documented)
        }
    return {name: parameter.default for name, parameter in inspect.signature(documented).parameters.items()}


def _documented() -> dict[str, object]:
    """All functions and classes of the package that document a default, by their import path."""
    found = {}
    for info in pkgutil.walk_packages(sapo_trl.__path__, "sapo_trl."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for item in vars(module).values():
            if not (inspect.isclass(item) or inspect.isfunction(item)) or item.__module__ != info.name:
                continue
            methods = vars(item).values() if inspect.isclass(item) else ()
            for member in (item, *(getattr(method, "__func__", method) for method in methods)):
                if (inspect.isclass(member) or inspect.isfunction(member)) and _DEFAULT.search(member.__doc__ or ""):
                    found[f"{info.name}.{member.__qualname__}"] = member
    return found


def test_documented_defaults_are_the_codes():
    compared = 0
    wrong = []
    for path, item in _documented().items():
        defaults = _defaults(item)
        for names, text in _DEFAULT.findall(item.__doc__):
            # A literal, an expression such as `2**20`, or the name of a constant beside it.
            documented = eval(text, dict(vars(sys.modules[item.__module__])))
            for name in names.split(", "):
                compared += 1
                actual = defaults.get(name, "no such parameter")
                if (documented, type(documented)) != (actual, type(actual)):
                    wrong.append(f"{path}: {name} is documented as {documented!r}, but it is {actual!r}")
    assert wrong == []
    assert compared > 250


@pytest.mark.parametrize(
    ("config", "parent"), [(SAPOConfig, GRPOConfig), (ReSTEMConfig, SFTConfig), (DPOPConfig, DPOConfig)]
)
def test_documented_differences_from_trl_are_the_codes(config, parent):
    """The note "Defaults to `1` instead of `8`" lists each parameter with another default, and both defaults."""
    notes = re.findall(r"> - `(\w+)`: Defaults to `([^`]*)` instead of `([^`]*)`\.", config.__doc__)
    noted = {name: (ast.literal_eval(ours), ast.literal_eval(theirs)) for name, ours, theirs in notes}
    declared = inspect.get_annotations(config).keys()
    ours, theirs = _defaults(config), _defaults(parent)
    assert noted == {
        name: (ours[name], getattr(theirs[name], "value", theirs[name])) for name in declared & theirs.keys()
    }
