"""The benchmarks, by the names that the command line takes."""

from ..benchmark import Benchmark
from .dynamath import DYNAMATH
from .geo3k import GEO3K
from .gsm8k import GSM8K
from .logicvista import LOGICVISTA
from .math500 import MATH500
from .mathverse import MATHVERSE
from .mathvista import MATHVISTA
from .mmbench import MMBENCH
from .mmmu import MMMU
from .mmstar import MMSTAR
from .scienceqa import SCIENCEQA
from .wemath import WEMATH


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        GEO3K,
        LOGICVISTA,
        MATHVERSE,
        WEMATH,
        MATHVISTA,
        DYNAMATH,
        SCIENCEQA,
        MMMU,
        MMBENCH,
        MMSTAR,
        GSM8K,
        MATH500,
    )
}

__all__ = ["BENCHMARKS"]
