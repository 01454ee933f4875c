"""Which package may import which: held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = "device distributed drawing errors files load_report loader page tables video"
SHARED = tuple(f"trainkit.{name}" for name in SHARED.split())
ALLOWED = {"kernels": (), "trainkit": (), "macl": ("kernels", *SHARED), "fgclip": ("kernels", *SHARED)}
# These import like scripts.
COMMANDS = "evaluate predict score report training extract evaluate_video watch pack export".split()
COMMANDS = {f"{name}.py" for name in COMMANDS}


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name not in COMMANDS]
    assert files
    for path in files:
        for name, line in imported(path):
            other = name.split(".")[0]
            if other in ALLOWED and other != package and name != "trainkit":
                fits = any(name == one or name.startswith(one + ".") for one in ALLOWED[package])
                assert fits, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_the_image_half_of_fgclip_imports_nothing_of_video():
    for path in sorted((ROOT / "fgclip").rglob("*.py")):
        if "video" not in str(path.relative_to(ROOT)) and path.name not in COMMANDS:
            assert not any("fgclip.video" in name for name, _ in imported(path)), path


@pytest.mark.parametrize("script", sorted(ROOT.glob("train_*.py")), ids=lambda path: path.name)
def test_scripts_set_up_the_host_before_torch(script):
    assert next(imported(script))[0] == "trainkit.process_setup"


def test_only_one_module_reads_the_environment():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            reads = "os.environ" in path.read_text(encoding="utf-8")
            known = path.relative_to(ROOT).as_posix() in ("trainkit/distributed.py", "trainkit/process_setup.py")
            assert not reads or known, f"{path.relative_to(ROOT)} reads the process environment"


@pytest.mark.parametrize("package", ["macl", "fgclip"])
def test_another_package_called_kernels_is_named_in_one_sentence(tmp_path, package):
    (tmp_path / "kernels.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{tmp_path}/kernels.py is another package named kernels" in done.stderr
