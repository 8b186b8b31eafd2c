"""Files appear whole or not at all, and errors of any storage are one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from subject_diffusion.errors import RunError, ShardError
from subject_diffusion.storage import file_system, is_temporary, named_errors, whole_file, whole_folder


def test_a_file_appears_when_it_is_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with whole_file(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
        (draft,) = (p.name for p in tmp_path.iterdir() if p != path)
        assert is_temporary(draft)
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.writelines([b"half", bytes(1 // 0)])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_without_a_folder_is_one_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_file("file") as file:
        file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_folder_appears_when_it_is_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("before", "after"):
        with whole_folder(folder) as partial:
            (partial / content).mkdir()
            (partial / content / "file").write_text(content)
        assert [p.name for p in folder.iterdir()] == [content]
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as partial:
        (partial / "half").write_bytes(bytes(1 // 0))
    assert [p.name for p in folder.iterdir()] == ["after"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "no such file or folder; check the path"),
        (PermissionError(13, "Permission denied"), "permission denied; let this user"),
        (OSError(28, "No space left on device"), "No space left on device; check"),
        (OSError("line one\nline two"), "line one line two; check"),
        (ModuleNotFoundError("No module named 's3fs'", name="s3fs"), r"pip install '\.\[s3\]' brings it"),
        (ImportError("Install ocifs"), "Install ocifs"),
    ],
)
def test_errors_name_the_path_and_what_to_do(error: Exception, said: str) -> None:
    with pytest.raises(ShardError, match=said) as caught, named_errors("s3://bucket/x", ShardError):
        raise error
    assert str(caught.value).startswith("s3://bucket/x: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_errors_of_the_program_itself_pass() -> None:
    with pytest.raises(KeyError), named_errors("x", ShardError):
        raise KeyError


def test_an_unknown_protocol_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RunError, match="Protocol not known: nosuch; use a path, s3://"):
        file_system("nosuch://bucket/x", RunError)
