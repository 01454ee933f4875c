"""`kernels` is also a package of Hugging Face: with it installed, transformers must still import beside ours."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("packages", [("transformers",), ("transformers", "kernels")])
def test_transformers_imports_beside_ours(packages, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", environment], check=True)
    python = environment / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install {packages} here: {installed.stderr.strip().splitlines()[-1]}")
    # As an editable install does: our folder on the path after the environment's packages, and then before them.
    for place in ("sys.path.append", "lambda folder: sys.path.insert(0, folder)"):
        code = f"import sys; ({place})({str(ROOT)!r}); import transformers; transformers.CLIPConfig; print('imported')"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip().endswith("imported"), done.stderr[-2000:]
