"""The set-up behind `make`: folders of wheels, programs of the machine, requirements of the GPU words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "development_environment.py"


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    specification = importlib.util.spec_from_file_location("development_environment", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def install_program(folder: Path, name: str, says: str, status: int = 0) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "status", "is_fit"),
    [
        ("cmake version 3.28.3", 0, True),
        ("cmake version 3.21", 0, True),
        ("cmake version 3.9.6", 0, False),
        ("cmake version 4.4.4", 1, False),
        ("broken", 0, False),
    ],
)
def test_a_program_of_the_machine_is_used_if_it_runs_and_is_new_enough(
    environment: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    status: int,
    is_fit: bool,
) -> None:
    install_program(tmp_path, "cmake", says, status)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment.has_program("cmake>=3.21") is is_fit
    assert environment.has_program("a-program-that-nobody-has>=1.0") is False


def test_a_folder_of_wheels_is_named_whole_and_must_exist(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHEELS", raising=False)
    assert environment.wheel_folder() is None
    (tmp_path / "wheels").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHEELS", "wheels")
    assert environment.wheel_folder() == tmp_path / "wheels"
    monkeypatch.setenv("WHEELS", "weels")
    with pytest.raises(environment.SetupError, match="no folder"):
        environment.wheel_folder()


def test_the_source_of_lmdb_is_named_whole_and_must_exist(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLD_LMDB_SOURCE", raising=False)
    assert environment.lmdb_source() == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLD_LMDB_SOURCE", "lmdb.tar.gz")
    with pytest.raises(environment.SetupError, match="does not exist"):
        environment.lmdb_source()
    (tmp_path / "lmdb.tar.gz").touch()
    assert environment.lmdb_source() == str(tmp_path / "lmdb.tar.gz")


def test_gpu_words_ask_neither_for_torch_nor_offline_for_plots(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHEELS", raising=False)
    online = environment.gpu_requirements()
    assert not [name for name in online if name.startswith("torch")]
    assert [name for name in online if name.startswith("pytest>")]
    assert [name for name in online if name.startswith("matplotlib")]
    monkeypatch.setenv("WHEELS", str(tmp_path))
    assert [name for name in online if name not in environment.gpu_requirements()] == ["matplotlib>=3.7"]
    (tmp_path / "matplotlib-3.10.0-cp312-none-any.whl").touch()
    assert environment.gpu_requirements() == online
