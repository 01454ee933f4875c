"""Fixtures that several folders share."""

import trainkit.process_setup  # noqa: F401, I001  before torch, so that a busy machine does not make the tests crawl

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
torch.set_num_threads(1)  # the models here are so small that threads only wait for each other


@pytest.fixture(scope="session")
def shared():
    """The folder of golden vectors and real samples beside the checkout; tests that want it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder with golden vectors and samples beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def two_ranks():
    """Runs a test file as a script in two gloo processes: `two_ranks(__file__, folder)`.

    The script is given the folder and writes folder/rank0.pt and folder/rank1.pt, whose contents are returned.
    """

    def run(script: str, folder: Path) -> list[dict]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests/harness'}"  # as pytest's own
        shared = {"PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        command = [sys.executable, "-W", "error", script, str(folder)]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(2)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=180)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]

    return run


@pytest.fixture(scope="session")
def backward_nodes():
    """backward_nodes(tensor): all nodes that a gradient of the tensor passes."""

    def nodes(tensor: torch.Tensor) -> set:
        seen, ahead = set(), [tensor.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in seen:
                seen.add(node)
                ahead += [function for function, _ in node.next_functions]
        return seen

    return nodes
