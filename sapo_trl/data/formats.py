"""The formats of the known data sets, by name."""

from typing import Literal

from .geometry3k import GEOMETRY3K
from .gsm8k import GSM8K
from .hendrycks_math import MATH
from .math12k import MATH12K
from .open_r1 import OPEN_R1
from .question import DataFormat


FormatName = Literal["geometry3k", "gsm8k", "math", "math12k", "open_r1"]

FORMATS: dict[FormatName, DataFormat] = {
    "geometry3k": GEOMETRY3K,
    "gsm8k": GSM8K,
    "math": MATH,
    "math12k": MATH12K,
    "open_r1": OPEN_R1,
}

FORMAT_OF_HUB_ID = {hub_id: data_format for data_format in FORMATS.values() for hub_id in data_format.hub_ids}
