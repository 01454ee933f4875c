"""benchmarks/kernels.py: every kind of case runs and states its error."""

import pytest
import torch

from benchmarks import kernels

SMALL = {
    "box_head": lambda: kernels.box_head("cpu", torch.float32, 2, 6, True, 0, (64, 96), 8),
    "box_head+linear": lambda: kernels.box_head("cpu", torch.float32, 2, 6, False, 5, (64, 96), 8),
    "regions": lambda: kernels.regions("cpu", torch.float32, 2, 5, 8, 7),
    "contrastive": lambda: kernels.contrast_inputs("cpu", torch.float32, 4, 20, 16),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_case_becomes_rows(kind):
    case = next(case for case in kernels.cases("cpu") if case.name.split()[0] == kind)._replace(make=SMALL[kind])
    rows = list(kernels.run_case(case, "cpu", rounds=1))
    assert {len(row) for row in rows} == {len(kernels.COLUMNS)}
    assert [row[1] for row in rows][1] == "ours" and float(rows[1][5]) < 1e-5
