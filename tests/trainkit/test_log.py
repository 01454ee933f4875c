import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from trainkit.errors import InputError
from trainkit.log import RunLog, Throughput, peak_memory


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_json_object_a_line_with_null_for_what_is_not_finite(tmp_path):
    log = RunLog(tmp_path, total_steps=2, tensorboard=False)
    log.train(1, {"epoch": 0, "loss": np.float32(0.5), "grad_norm": math.inf, "lr": torch.tensor(0.25)})
    assert len(lines(tmp_path)) == 1  # before it is closed: a killed run keeps its numbers
    log.write("validation", 2, {"both": {"ap50": math.nan, "per_class": [1.0, -math.inf]}, "split": "test"})
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "epoch": 0, "kind": "train", "loss": 0.5, "grad_norm": None, "lr": 0.25},
        {"step": 2, "epoch": None, "kind": "validation", "both": {"ap50": None, "per_class": [1.0, None]},
         "split": "test"},
    ]  # fmt: skip


def test_resume_cuts_the_log_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, total_steps=9, tensorboard=False)
    for step in range(1, 6):
        log.train(step, {"epoch": 0, "loss": float(step)})
    log.write("validation", 5, {"epoch": 0, "ap50": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')  # killed while it wrote
    log = RunLog(tmp_path, total_steps=9, resume_step=3, tensorboard=False)
    log.train(4, {"epoch": 0, "loss": 40.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    RunLog(tmp_path, total_steps=9, tensorboard=False).close()
    assert lines(tmp_path) == []  # a run that starts again begins its log anew


def test_a_log_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl: line 2 is not a json object"):
        RunLog(tmp_path, total_steps=3, resume_step=2, tensorboard=False)
    assert "hello" in (tmp_path / "metrics.jsonl").read_text()


def test_a_file_gets_plain_lines_now_and_then(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=100, every=10, tensorboard=False)
    for step in range(1, 31):
        values = {"epoch": 2, "loss": 0.123456, "more": {"grad_norm": math.inf}}
        log.train(step, values, seconds_per_step=None if step == 1 else 2.0)
    log.say("done")
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[:4]] == ["1/100", "10/100", "20/100", "30/100"]
    assert out[1].endswith("epoch 2  loss 0.1235  more/grad_norm inf") and "left 0:03:00" in out[1]
    assert "left" not in out[0]
    assert out[4:] == ["done"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_time_left_and_whole_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLog(tmp_path, total_steps=4, resume_step=1, every=2, tensorboard=False)
    for step in range(2, 5):
        log.train(step, {"loss": 0.5})
    log.say("a word")
    bar = sys.stderr.getvalue()
    log.close()
    assert "25%" in bar and "| 1/4 " in bar and "| 4/4 " in sys.stderr.getvalue()
    assert capsys.readouterr().out.splitlines()[-1] == "a word"


def test_tensorboard_gets_the_same_numbers_and_its_absence_is_said(tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, total_steps=2)
    log.train(1, {"epoch": 0, "loss": 0.5, "bad": math.nan})
    log.write("validation", 1, {"both": {"ap50": 0.75}})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "validation/both/ap50"]
    assert events.Scalars("validation/both/ap50")[0].value == 0.75

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunLog(tmp_path, total_steps=2).close()
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1


def test_throughput_is_of_the_last_steps_without_pauses_and_the_first_step(monkeypatch):
    now = iter([0.0, 8.0, 10.0, 11.0, 14.0, 100.0, 101.0])
    monkeypatch.setattr("trainkit.log.time.perf_counter", lambda: next(now))
    rate = Throughput(window=2)
    assert rate.update(8) == (1.0, None)
    assert [rate.update(8), rate.update(8), rate.update(8)] == [(4.0, 2.0), (16 / 3, 1.5), (4.0, 2.0)]
    rate.restart()
    assert rate.update(8) == (4.0, 2.0)


def test_peak_memory_is_that_of_a_torch_process_in_gib():
    assert 0.05 < peak_memory(torch.device("cpu")) < 64
