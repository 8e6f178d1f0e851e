"""The code of docs/integrations.md runs, each section behind the page's first block, where its tools are."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from test_readme_and_example import ROOT, run

PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = {
    "Sample ids": [],
    "PyTorch Lightning": ["lightning"],
    "Hugging Face Trainer": ["transformers", "accelerate"],
    "Accelerate": ["accelerate"],
    "cleanlab": ["cleanlab"],
    "TensorBoard": [],
    "FiftyOne": ["fiftyone"],
}


def parts_of_the_page() -> dict[str, str]:
    """The code of each section by its title; of the beginning under the empty one."""
    first, *others = re.split(r"^## ", PAGE, flags=re.M)
    titled = {"": first, **dict(part.split("\n", 1) for part in others)}
    return {
        title: "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))
        for title, text in titled.items()
    }


def test_every_section_is_tried() -> None:
    assert list(parts_of_the_page()) == ["", *SECTIONS]
    assert all(parts_of_the_page().values())


@pytest.mark.parametrize("section", SECTIONS)
def test_code_of_the_section_runs(section: str, tmp_path: Path) -> None:
    for package in SECTIONS[section]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if section == "FiftyOne" and shutil.which("mongod") is None:
        pytest.skip("fiftyone has no MongoDB here")
    parts = parts_of_the_page()
    program = tmp_path / "page.py"
    program.write_text(parts[""] + parts[section], encoding="utf-8")
    result = run(program, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
