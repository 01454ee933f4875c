"""Every shipped kernel configuration compiles for real GPUs, without one, and fits them: no spilled registers, shared
memory within the limit, matrix instructions and 16-byte loads where they belong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = dict(sm_80=166912, sm_90=232448, sm_100=232448, gfx942=65536)
PRODUCTS = ("pool_backward", "pool_project", "stream_64", "stream_128", "stream_256")
BEST = dict(sm_80="mma.sync", sm_90="wgmma.mma_async", sm_100="tcgen05.mma", gfx942="mfma")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(target, tmp_path, *names):
    environment = os.environ | dict(
        TRITON_DEFAULT_FP_FUSION="1",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        PYTHONPATH=str(ROOT),
        TRITON_INTERPRET="0",
    )
    script = Path(__file__).with_name("ahead_of_time.py")
    command = [sys.executable, str(script), target, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(line):
    target = line["target"]
    assert line["stack"] == 0 and line["shared"] <= SHARED_LIMIT[target], line
    if line["kernel"] in PRODUCTS:
        assert line["mma"] == BEST.get(target, line["mma"]) is not None, line
    if line["kernel"] == "pool_forward" and not target.startswith("gfx"):
        assert line["wide_loads"] >= 8, line


def test_kernels_fit_hopper(tmp_path):
    for line in compiled("sm_90", tmp_path, "pool_forward", "pool_backward", "stream_512", "combine", "settle_rows"):
        check(line)


def test_a_spilling_configuration_is_caught(tmp_path):
    for line in compiled("sm_90", tmp_path, "spilling"):
        with pytest.raises(AssertionError):
            check(line)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_configuration_fits(target, tmp_path):
    lines = compiled(target, tmp_path)
    assert lines
    for line in lines:
        check(line)
