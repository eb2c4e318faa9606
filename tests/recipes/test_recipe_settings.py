"""The settings of both recipes and their run files."""

from pathlib import Path

import pytest
from trl import SFTConfig, TrlParser

from sapo_trl.recipes import (
    DPOPConfig,
    ReSTEMConfig,
)


CONFIGS = Path(__file__).parents[2] / "trainer_configs" / "algorithms"


class TestConfigurations:
    def test_the_papers_values_are_the_defaults(self, tmp_path):
        args = ReSTEMConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (args.num_samples, args.sampling_temperature, args.top_k, args.max_kept_per_prompt) == (32, 0.7, 40, 10)
        assert isinstance(args, SFTConfig) and args.max_length is None
        args = DPOPConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert (args.dpop_penalty, args.max_pairs_per_prompt, args.max_length) == (50.0, 1, None)

    @pytest.mark.parametrize(("name", "config"), [("restem", ReSTEMConfig), ("dpop", DPOPConfig)])
    def test_files_are_read_and_overridden(self, name, config):
        line = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "--bf16", "false", "--num_samples", "3"]
        (args,) = TrlParser(config).parse_args_and_config(line)
        assert type(args) is config
        assert args.output_dir == f"outputs/{name}"
        assert (args.num_samples, args.sampling_batch_size, args.reward_threshold) == (3, 64, 0.0)

    @pytest.mark.parametrize("config", [ReSTEMConfig, DPOPConfig])
    def test_every_setting_has_a_help_text_and_a_place_in_the_docs(self, config):
        for cls in config.__mro__[:2]:
            for name in vars(cls).get("__annotations__", {}):
                assert config.__dataclass_fields__[name].metadata["help"]
                assert name in cls.__doc__
