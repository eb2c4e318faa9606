import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def long_description() -> str:
    """The README with absolute addresses: a package index shows it, and has neither the files nor the pictures."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{repository}/raw/main/", text)
    return re.sub(
        r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?!https?:|#)", rf"\g<1>{repository}/blob/main/", text
    )


# The run files lie beside the package in a checkout, where people look for them, and inside of it in a wheel. The rest
# is in pyproject.toml.
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["sapo_trl*"]), "sapo_trl.trainer_configs"],
    package_dir={"sapo_trl.trainer_configs": "trainer_configs"},
    package_data={"sapo_trl.trainer_configs": ["*.yaml", "*/*.yaml"]},
)
