"""The sizes in docs/install.md are those of the files that the distributions record."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks import install_size


def install(folder: Path, name: str, size: int, *asked: str) -> None:
    """A distribution with one file of that size, which asks for others."""
    module = f"{name}.py"
    (folder / module).write_bytes(b"#" * size)
    record = folder / f"{name}-1.dist-info"
    record.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", *(f"Requires-Dist: {a}" for a in asked)]
    (record / "METADATA").write_text("\n".join(lines) + "\n")
    (record / "RECORD").write_text(f"{module},,\nlost.py,,\n")


def test_an_extra_is_what_it_asks_for_and_what_these_ask_for(tmp_path, monkeypatch):
    asked = ("aa-base", "aa-tool[fast]; extra == 'tools'", "aa-project[tools]; extra == 'all'")
    install(tmp_path, "aa_project", 1, *asked)
    install(tmp_path, "aa_base", 10, "aa-other; sys_platform == 'none'")
    install(tmp_path, "aa_tool", 100, "aa-fast; extra == 'fast'", "aa-slow; extra == 'slow'", "aa-lost")
    install(tmp_path, "aa_fast", 1000, "aa-base")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(install_size, "PROJECT", "aa-project")
    assert install_size.requirements() == ({"aa-base"}, set())
    for extra in ("tools", "all"):
        assert install_size.requirements(extra) == ({"aa-base", "aa-tool", "aa-fast"}, {"aa-lost"})
    assert install_size.size_of(distribution("aa-fast")) == 1000


def test_the_base_installation_is_under_a_gigabyte():
    found, missing = install_size.requirements()
    assert {"numpy", "pyarrow"} <= found and "torch" not in found and not missing
    assert 0.2e9 < sum(install_size.size_of(distribution(name)) for name in found) < 1e9


def test_every_extra_has_a_row(capsys: pytest.CaptureFixture[str]):
    install_size.main()
    printed = capsys.readouterr().out
    extras = distribution(install_size.PROJECT).metadata.get_all("Provides-Extra") or ()
    assert all(f"│ {extra} " in printed for extra in ("none", *extras))
