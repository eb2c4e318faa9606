"""Presets: what they set, what is written about them, and that nothing else differs."""

import itertools
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from trl import TrlParser

from docs.generate.preset_table import DOCUMENT, TABLE_END, TABLE_START, YAML_FOLDER, markdown_table, yaml_text
from sapo_trl import PRESETS, SAPOConfig
from sapo_trl.presets import AXES, RECIPES, preset_settings


ROOT = Path(__file__).parents[1]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def table_in_docs() -> dict[str, dict[str, object]]:
    """What the table in the documentation says each row sets, read from its cells."""
    text = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    lines = text.split(TABLE_START)[1].split(TABLE_END)[0].strip().splitlines()
    rows = {}
    for line in lines[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        pairs = [pair.split("=", 1) for cell in cells for pair in re.findall(r"`([^`]*)`", cell)]
        rows[name.strip("`*")] = {key: json.loads(value) for key, value in pairs}
    return rows


def settings_of(args: SAPOConfig) -> dict[str, object]:
    """Every field, but for what transformers derives from the time of day."""
    return {name: value for name, value in asdict(args).items() if name != "logging_dir"}


class TestTable:
    def test_every_preset_does_what_its_row_says(self, tmp_path):
        table = table_in_docs()
        defaults = table.pop("defaults")
        assert table.keys() == PRESETS.keys()
        plain = settings_of(SAPOConfig(output_dir=str(tmp_path), **CPU))
        assert {name: plain[name] for name in defaults} == defaults
        for name, row in table.items():
            expected = plain | row
            actual = settings_of(SAPOConfig.from_preset(name, str(tmp_path), **CPU))
            # TRL derives this one from `num_generations` if nothing else is said; the batch stays what it was.
            assert {k: v for k, v in actual.items() if v != expected[k]} == {}, name

    def test_two_presets_differ_only_in_what_their_rows_show(self, tmp_path):
        table = table_in_docs()
        defaults = table.pop("defaults")
        built = {name: settings_of(SAPOConfig.from_preset(name, str(tmp_path), **CPU)) for name in PRESETS}
        for one, other in itertools.combinations(PRESETS, 2):
            differing = {key for key, value in built[one].items() if built[other][key] != value}
            rows = defaults | table[one], defaults | table[other]
            assert differing == {key for key in defaults if rows[0][key] != rows[1][key]}, (one, other)

    def test_each_setting_is_in_one_axis(self):
        listed = [name for names in AXES.values() for name in names]
        assert len(listed) == len(set(listed))
        used = set().union(*(preset.settings for preset in PRESETS.values()))
        assert used <= set(listed) <= {field.name for field in fields(SAPOConfig)}

    def test_table_is_up_to_date(self):
        """Otherwise: `python -m docs.generate.preset_table`."""
        assert markdown_table() in (ROOT / DOCUMENT).read_text(encoding="utf-8")


class TestYaml:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_file_makes_the_same_configuration(self, preset, tmp_path):
        path = ROOT / YAML_FOLDER / f"{preset}.yaml"
        arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        (parsed,) = TrlParser((SAPOConfig,)).parse_args_and_config([*arguments, "--report_to", "none"])
        assert settings_of(parsed) == settings_of(SAPOConfig.from_preset(preset, str(tmp_path), **CPU))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_file_is_up_to_date(self, preset):
        """Otherwise: `python -m docs.generate.preset_table`."""
        assert (ROOT / YAML_FOLDER / f"{preset}.yaml").read_text(encoding="utf-8") == yaml_text(preset)

    def test_no_other_file_is_there(self):
        names = {path.stem for path in (ROOT / YAML_FOLDER).glob("*.yaml")}
        assert names == PRESETS.keys() | RECIPES.keys()


class TestFromPreset:
    def test_overrides_win(self, tmp_path):
        args = SAPOConfig.from_preset("ppo", str(tmp_path), lam=0.5, learning_rate=3e-7, **CPU)
        assert (args.lam, args.learning_rate, args.segmentation) == (0.5, 3e-7, "token")

    def test_a_preset_is_not_changed_by_its_use(self):
        preset_settings("ppo")["lam"] = 0.0
        assert PRESETS["ppo"].settings["lam"] == 0.95

    @pytest.mark.parametrize(
        ("preset", "overrides", "message"),
        [
            ("vinepo", {}, "There is no preset 'vinepo'. Did you mean `vineppo`"),
            ("restem", {}, "use `sapo_trl.recipes.ReSTEMConfig`"),
            ("ppo", {"lamda": 0.9}, "`lamda` is no setting of `SAPOConfig`. Did you mean `lam`"),
            ("grpo", {"num_generations": 1}, "`num_generations` must be at least 2, got 1"),
            ("grpo", {"critic": "separate"}, "reads no values: set `critic=\"none\"`, got 'separate'"),
            ("grpo", {"kl_placement": "reward", "kl_estimator": "k1"}, "has the KL penalty as k3 in the loss"),
            ("grpo", {"importance_sampling_level": "segment"}, "is TRL's and knows no segments"),
            ("grpo", {"positive_lm_coef": 0.1}, "`positive_lm_coef` has no meaning with `loss_type='grpo'`"),
            ("grpo", {"loss_type": "segment_clip", "kl_placement": "reward"}, "would have no effect"),
            ("ppo", {"top_entropy_quantile": 0.2}, 'Set `entropy_token_share=0.2` and `entropy_token_scope="batch"`'),
            ("grpo", {"entropy_token_share": 0}, r"`entropy_token_share` must lie in \(0, 1\] .*, got 0"),
            ("gspo", {"entropy_token_share": 0.2}, "over the tokens that the policy learns from alone"),
            ("spo_tree", {"mask_truncated_completions": True}, "`mask_truncated_completions=True` would drop"),
            ("spo_tree", {"kl_placement": "reward"}, "the KL penalty can only go into the"),
            ("vineppo", {"value_state": "end"}, '`value_state` must be "start"'),
            ("vc_ppo", {"critic_warmup_steps": 0}, "its longest duration, is 0"),
            ("spo_tree", {"tree_widths": [6, 0]}, "`tree_widths` must be a list of numbers of children"),
            ("spo_chain", {"confident_token_threshold": 90}, r"must lie in \(0, 1\] .*, got 90. It is a probability."),
            ("srpo", {"image_corruption_share": 60}, r"`image_corruption_share` must lie in \[0, 1\], got 60"),
        ],
    )
    def test_errors_name_what_is_wrong(self, preset, overrides, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            SAPOConfig.from_preset(preset, str(tmp_path), **overrides, **CPU)
