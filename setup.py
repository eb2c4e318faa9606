import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def long_description() -> str:
    """
    The README without relative addresses: a package index shows it, and has neither the files nor the pictures.

    The addresses become absolute. As long as the repository has no address, links become their texts, and pictures are
    left out.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return with_absolute_addresses((ROOT / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository"))


def with_absolute_addresses(text: str, repository: str | None) -> str:
    picture, link = r"(!\[[^\]]*\]\()(?!https?:)", r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?!https?:|#)"
    if repository is not None:
        text = re.sub(picture, rf"\g<1>{repository}/raw/main/", text)
        return re.sub(link, rf"\g<1>{repository}/blob/main/", text)
    text = re.sub(rf"{picture}[^)]*\)", "", text)
    text = re.sub(r"(?<!!)\[([^\[\]]*)\]\((?!https?:|#)[^)]*\)", r"\g<1>", text)
    return re.sub(r"\n{3,}", "\n\n", text)


# The run files lie beside the package in a checkout, where people look for them, and inside of it in a wheel. The rest
# is in pyproject.toml.
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["sapo_trl*"]), "sapo_trl.trainer_configs"],
    package_dir={"sapo_trl.trainer_configs": "trainer_configs"},
    package_data={"sapo_trl.trainer_configs": ["*.yaml", "*/*.yaml"]},
)
