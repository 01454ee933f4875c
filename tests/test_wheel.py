"""The wheel: it holds all of the source, and its console commands run where nothing of the checkout is."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from trainkit.command import module_of

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("macl", "fgclip", "kernels", "trainkit")
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
RUN_ALL = """
import importlib.metadata, sys
for command in importlib.metadata.entry_points(group="console_scripts"):
    if command.value == "trainkit.command:main":
        sys.argv = ["/somewhere/bin/" + command.name, "--help"]
        try:
            command.load()()
        except SystemExit as stop:
            print("exit", stop.code, command.name)
import macl
print(macl.__file__)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_called_after_its_module(command):
    spec = importlib.util.find_spec(module_of(command))
    assert spec is not None and "\ndef main(arguments: list[str] | None = None)" in Path(spec.origin).read_text()


@pytest.mark.slow
def test_a_wheel_holds_the_source_and_its_commands_run(tmp_path):
    pytest.importorskip("build")
    checkout, installed = tmp_path / "checkout", tmp_path / "installed"
    for package in SOURCE:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, checkout)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, checkout]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    source = {path.relative_to(ROOT).as_posix() for name in SOURCE for path in (ROOT / name).rglob("*.py")}
    assert held == source | {path.name for path in ROOT.glob("train_*.py")}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(pip, check=True)
    code = f"import sys\nsys.path.insert(0, {str(installed)!r})\n{RUN_ALL}"
    run = subprocess.run([sys.executable, "-P", "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and lines[-1] == str(installed / "macl/__init__.py"), run.stderr
    assert {line for line in lines if line.startswith("exit")} == {f"exit 0 {command}" for command in COMMANDS}
