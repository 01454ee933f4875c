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


def fits(line):
    target, kernel = line["target"], line["kernel"]
    if line["stack"] or line["shared"] > SHARED_LIMIT[target]:
        return False
    if kernel.startswith("pool_backward") and (line["mma"] is None or line["mma"] != BEST.get(target, line["mma"])):
        return False
    taps = dict(pool_forward_pyramid=8, pool_forward_regions=4).get(kernel)  # loads of the four, channels-last
    return taps is None or target.startswith("gfx") or line["wide_loads"] >= taps


def test_kernels_fit_hopper(tmp_path):
    names = "pool_forward_pyramid pool_backward_pyramid pool_forward_regions finish_rows"
    lines = compiled("sm_90", tmp_path, *names.split())
    assert lines and not [line for line in lines if not fits(line)]


def test_a_spilling_configuration_is_caught(tmp_path):
    lines = compiled("sm_90", tmp_path, "spilling")
    assert lines and not any(fits(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_configuration_fits(target, tmp_path):
    lines = compiled(target, tmp_path)
    assert lines and not [line for line in lines if not fits(line)]
