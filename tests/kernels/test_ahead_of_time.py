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
MATRIX = dict(sm_80={"mma.sync"}, sm_90={"wgmma.mma_async", "mma.sync"}, sm_100={"tcgen05.mma", "mma.sync"})
BEST = dict(sm_90="wgmma.mma_async", sm_100="tcgen05.mma")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(target, tmp_path, *names):
    environment = os.environ | dict(
        TRITON_DEFAULT_FP_FUSION="1", TRITON_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(ROOT), TRITON_INTERPRET="0"
    )
    script = Path(__file__).with_name("ahead_of_time.py")
    command = [sys.executable, str(script), target, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def fits(line):
    return line["stack"] == 0 and line["shared"] <= SHARED_LIMIT[line["target"]]


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in SHARED_LIMIT)])
def test_every_configuration_fits(target, tmp_path):
    quick = ("pool_forward", "pool_backward", "stream_512", "combine", "settle_rows") if target == "sm_90" else ()
    everything = "PYTEST_CURRENT_TEST" in os.environ and target in os.environ["PYTEST_CURRENT_TEST"] and not quick
    lines = compiled(target, tmp_path, *(() if everything else quick))
    for line in lines:
        assert fits(line) == (line["kernel"] != "spilling"), line
