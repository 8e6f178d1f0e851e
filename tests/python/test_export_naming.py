"""Where an export goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.exporting.naming import default_name, resolve_output


def test_the_default_name_is_model_version_and_epoch() -> None:
    assert default_name("resnet18", "v1", None) == "resnet18_v1.zip"
    assert default_name("resnet18", "v1", 3) == "resnet18_v1_epoch3.zip"


@pytest.mark.parametrize(
    "name", ["../../x", "a/b\\c", "..", ".", "a\0b", "\udc80", "C:x", "line\nbreak", "x" * 300, "ä" * 200]
)
def test_hostile_names_make_safe_file_names(name: str, tmp_path: Path) -> None:
    made = default_name(name, name, 12)
    assert len(made.encode()) <= 255 and made.endswith("_epoch12.zip")
    assert not set(made) & set("/\\\0\n:") and not made.startswith(".")
    (tmp_path / made).touch()
    assert [path.name for path in tmp_path.iterdir()] == [made]


def test_long_names_that_begin_alike_stay_different() -> None:
    assert default_name("x" * 300 + "a", "v", None) != default_name("x" * 300 + "b", "v", None)


def test_a_path_with_the_ending_is_a_file_and_any_other_a_directory(tmp_path: Path) -> None:
    assert resolve_output(tmp_path / "a" / "b.zip", "n.zip") == tmp_path / "a" / "b.zip"
    assert resolve_output(str(tmp_path / "a"), "n.zip") == tmp_path / "a" / "n.zip"
    (tmp_path / "d.zip").mkdir()
    assert resolve_output(tmp_path / "d.zip", "n.zip") == tmp_path / "d.zip" / "n.zip"


def test_the_default_is_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_output(None, "n.zip") == tmp_path / "n.zip"


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    for path in (1, b"x", True, ["x"]):
        with pytest.raises(InvalidTypeError, match="output_path"):
            resolve_output(path, "n.zip")  # type: ignore[arg-type]
    for path in ("", "a\0.zip"):
        with pytest.raises(InvalidInputError, match="output_path"):
            resolve_output(path, "n.zip")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="is a file"):
        resolve_output(tmp_path / "file", "n.zip")
