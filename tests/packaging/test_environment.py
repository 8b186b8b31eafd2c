"""What is installed here fits together, and what is written about the project in several places is the same."""

from __future__ import annotations

import importlib.metadata
import tomllib

import yaml

from subject_diffusion._version import __version__
from tests.toy import PROJECT


def test_one_distribution_alone_provides_opencv():
    owners = {owner.lower().replace("_", "-") for owner in importlib.metadata.packages_distributions()["cv2"]}
    assert owners == {"opencv-python-headless"}, "two overwrite each other; see docs/install.md"


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == __version__
    assert f"## [{__version__}]" in (PROJECT / "CHANGELOG.md").read_text()


def test_every_extra_is_explained_where_it_is_documented():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (PROJECT / "docs/install.md").read_text()
    for extra in extras:
        assert f"`[{extra}]`" in text


def test_the_constraints_name_each_package_once():
    lines = [li for li in (PROJECT / "constraints.txt").read_text().splitlines() if not li.startswith("#")]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert "opencv-python" not in names
