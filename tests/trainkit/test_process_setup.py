"""What importing trainkit.process_setup changes, seen in processes of their own: it acts once per process."""

import ctypes
import os
import subprocess
import sys

import pytest
from scripts import ROOT

SCRIPT = """
import resource, sys
if "set up" in sys.argv:
    import trainkit.process_setup
import os, torch
for step in range(24):
    if step == 20:  # by then the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25 * 2**20)  # 100 MiB
print(os.environ.get("OMP_WAIT_POLICY"), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*arguments, **environment):
    """The policy of waiting threads, and the page faults of four tensors of 100 MiB."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    policy, faults = printed.split()
    return policy, int(faults)


def test_threads_wait_asleep_and_freed_memory_is_kept():
    policy, faults = run("set up")
    assert policy == "PASSIVE"
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    assert faults < run()[1] / 10


def test_a_policy_that_is_set_is_left_alone():
    assert run("set up", OMP_WAIT_POLICY="ACTIVE")[0] == "ACTIVE"
