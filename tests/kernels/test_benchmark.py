"""benchmarks/kernels.py: every kind of case runs, states its error, and is written."""

import csv

import pytest
import torch

from benchmarks import kernel_cases, kernels

LIMITS = {"copy": 1e10, torch.float32: 1e11}
SMALL = {
    "box_head": lambda: kernel_cases.box_head("cpu", torch.float32, 2, 6, True, (64, 96), 8),
    "box_head+linear": lambda: (
        *kernel_cases.box_head("cpu", torch.float32, 2, 6, False, (64, 96), 8),
        *kernel_cases.linear("cpu", torch.float32, 8, 5),
    ),
    "regions": lambda: kernel_cases.regions("cpu", torch.float32, 2, 5, 8, 7),
    "contrastive": lambda: kernel_cases.contrast_inputs("cpu", torch.float32, 4, 20, 16),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_case_becomes_rows(kind, monkeypatch, tmp_path):
    case = next(case for case in kernel_cases.cases("cpu") if case.name.split()[0] == kind)._replace(make=SMALL[kind])
    monkeypatch.setattr(kernels, "measure", lambda functions, _: {name: [2.0, 1.0, 1.0] for name in functions})
    rows = list(kernels.run_case(case, "cpu", LIMITS, compiled=False))
    ours = [row for row in rows if row["provider"] == "ours"]
    assert [row["kind"] for row in ours] == ["forward", "forward+backward"]
    assert ours[1]["error"] < 1e-5 and ours[1]["ratio"] == 1 and 0 < ours[1]["roofline"] < ours[0]["roofline"] * 10
    kernels.write(tmp_path / "table", ["a machine"], rows)
    with (tmp_path / "table.csv").open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == [row["provider"] for row in rows]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1


def test_the_case_names_are_distinct():
    names = [case.name for case in kernel_cases.cases("cuda")]
    assert len(names) == len(set(names))


def test_what_cannot_run_here_is_left_out(capsys):
    x = torch.ones(3, requires_grad=True)

    def fail():
        raise RuntimeError("out of memory\nmore")

    providers = {"naive": kernel_cases.Provider(lambda: x * 2), "naive, compiled": kernel_cases.Provider(fail)}
    assert list(kernels.able(providers, [x])) == ["naive"]
    assert capsys.readouterr().out == "left out: naive, compiled: out of memory\n"
