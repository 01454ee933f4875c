"""The size of the code: what is added has to be paid for by what it makes superfluous (see CONTRIBUTING.md)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VIDEO = [
    "fgclip/video/*.py",
    *(f"fgclip/{name}.py" for name in ("extract", "evaluate_video", "watch", "video_plots")),
    "train_video.py",
]
PARTS = {
    "source": ["macl/**/*.py", "fgclip/**/*.py", "trainkit/**/*.py", "kernels/**/*.py", "train_*.py"],
    "video": VIDEO,
    "benchmarks": ["benchmarks/**/*.py"],
    "tests": ["tests/**/*.py"],
}


@pytest.mark.parametrize("part", PARTS)
def test_the_code_stays_within_its_budget(part):
    """Lines as `wc -l` counts them, against the table of CONTRIBUTING.md."""
    (budget,) = re.findall(rf"^\| {part} \|.*\| ([\d ]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    paths = {path for pattern in PARTS[part] for path in ROOT.glob(pattern)}
    paths -= {path for pattern in VIDEO for path in ROOT.glob(pattern)} if part == "source" else set()
    lines = sum(path.read_bytes().count(b"\n") for path in paths)
    assert lines <= int(budget.replace(" ", "")), f"{part} has {lines} lines"
