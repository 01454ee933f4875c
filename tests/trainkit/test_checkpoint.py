import math
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainkit import checkpoint, distributed
from trainkit.checkpoint import Signals, find_resume, load, rng_state, save, set_rng_state
from trainkit.errors import InputError
from trainkit.loader import make_loader
from trainkit.log import RunLog
from trainkit.optimizer import build_optimizer, build_schedule, ema, parameter_groups
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep, micro_batches


class Noisy(Dataset):
    """Ten vectors; augmentation draws from (epoch, index), as the samplers' keys allow."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        noise = torch.Generator().manual_seed(100 * epoch + index)
        return torch.full((3,), index / 10) + torch.randn(3, generator=noise)


def run(folder: Path, steps: int, *, amp: str, resume: bool = False) -> dict:
    """Train a tiny model to `steps` optimizer steps of two batches as a script would; everything a run remembers."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = build_optimizer("adamw", parameter_groups(model, lr=0.05, weight_decay=0.1))
    schedule = build_schedule(optimizer, "one-cycle", total_steps=12, warmup_steps=3)
    average = ema(model, 0.8)
    sampler = ResumableSampler(17, 2, seed=4)  # eight batches an epoch
    workers = 1 if amp == "none" else 0
    loader = DataLoader(Noisy(), batch_sampler=sampler, num_workers=workers, generator=torch.Generator())

    def losses_of(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        shift = random.random() + np.random.rand()
        return {"square": (model(batch).float() - shift).square().mean()}

    step = TrainStep(
        *(model, optimizer),
        losses_of=losses_of,
        weights={"square": 1.0},
        describe=lambda batch: [],
        device="cpu",
        schedule=schedule,
        average=average,
        amp=amp,
        clip_norm=1.0,
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": average, "step": step}
    parts["sampler"] = sampler
    if resume:
        state = load(folder / "last.pt")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_rng_state(state["rng"][distributed.rank()])
    log = RunLog(folder, total_steps=12, resume_step=step.steps if resume else None, tensorboard=False)
    for epoch in range(sampler.epoch, 3):
        sampler.set_epoch(epoch)
        for batches in micro_batches(loader, 2):
            result = step(batches)
            sampler.advance(len(batches))
            if not result.skipped:
                log.train(step.steps, {"epoch": epoch, **result.losses, "norm": result.grad_norm, "lr": result.lr})
            if step.steps == steps:
                break
        if step.steps == steps:
            break
    log.close()
    state = {name: part.state_dict() for name, part in parts.items()}
    state["rng"] = distributed.gather_objects(rng_state())
    save(folder / "last.pt", state)
    return state


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_ten_steps_are_five_and_five_resumed_bit_for_bit(tmp_path, amp):
    whole = run(tmp_path / "whole", 10, amp=amp)
    run(tmp_path / "halves", 7, amp=amp)
    (tmp_path / "halves" / "metrics.jsonl").rename(tmp_path / "seven.jsonl")
    five = run(tmp_path / "halves", 5, amp=amp)
    assert 0 < five["sampler"]["position"] < 8 and not same(five["model"], whole["model"])
    # As after a killed run: the log knows more steps than the checkpoint.
    (tmp_path / "seven.jsonl").rename(tmp_path / "halves" / "metrics.jsonl")
    halves = run(tmp_path / "halves", 10, amp=amp, resume=True)
    assert {name for name in whole if not same(whole[name], halves[name])} == set()
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "halves")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 10
    assert amp == "none" or "scale" in whole["step"]["scaler"]


def test_random_states_go_through_a_checkpoint(tmp_path):
    save(tmp_path / "rng.pt", {"rng": rng_state()})

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()

    first = draw()
    set_rng_state(load(tmp_path / "rng.pt")["rng"])
    assert draw() == first


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"args": {"output": Path("runs")}}, r"state\['args'\]\['output'\] is a PosixPath"),
        ({"ap": [0.5, np.float64(0.5)]}, r"state\['ap'\]\[1\] is a float64"),
        ({"step": np.int64(3)}, "int64"),
        ({"classes": {"person"}}, "set"),
        ({"sizes": torch.zeros(2).shape}, "Size"),
        ({"ids": {(1, 2): 3}}, r"the key \(1, 2\)"),
    ],
)
def test_only_tensors_and_plain_python_are_written(tmp_path, value, place):
    with pytest.raises(TypeError, match=place):
        save(tmp_path / "last.pt", value)
    assert list(tmp_path.iterdir()) == []


def test_everything_plain_comes_back(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {
        "model": model.state_dict(),
        "kwargs": {"classes": ("person",), "min_size": None, "scales": [0.5, True, -1]},
    }
    save(tmp_path / "last.pt", state)
    assert same(load(tmp_path / "last.pt"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, InputError)])
def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, seen):
    save(tmp_path / "last.pt", {"step": 1})

    def half_written(state, file):
        file.write(b"PK\x03\x04 half")
        raise error

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(seen, match=None if seen is error else "last.pt cannot be written"):
        save(tmp_path / "last.pt", {"step": 2})
    assert load(tmp_path / "last.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path):
    script = """if True:
        import sys, torch
        from trainkit.checkpoint import save
        for step in range(10**6):
            save(sys.argv[1] + "/last.pt", {"step": step, "weights": torch.full((1000, 1000), float(step))})
            print(step, flush=True)
    """
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as process:
        for _ in range(3):
            process.stdout.readline()
        process.kill()
    state = load(tmp_path / "last.pt")
    assert state["step"] >= 2 and torch.equal(state["weights"], torch.full((1000, 1000), float(state["step"])))


def test_files_that_are_no_checkpoint_get_one_sentence(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(InputError, match="last.pt does not exist"):
        load(path)
    for content in (b"", b"not a checkpoint", pickle.dumps({"step": 1})):
        path.write_bytes(content)
        with pytest.raises(InputError, match="last.pt was not written by torch.save"):
            load(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="expected a dictionary, found a list"):
        load(path)
    torch.save({"path": tmp_path}, path)
    with pytest.raises(InputError, match="holds more than tensors"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_gets_one_sentence(tmp_path, zipped):
    path = tmp_path / "last.pt"
    torch.save(run_state := {"weights": torch.arange(2000.0)}, path, _use_new_zipfile_serialization=zipped)
    assert same(load(path), run_state)
    content = path.read_bytes()
    for length in range(20, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="cut short|not written by"):
            load(path)


def test_resume_takes_a_file_a_folder_or_finds_the_run(tmp_path):
    runs = tmp_path / "runs"
    for order, name in enumerate(("toy-2", "toy-1", "other-3", "toy-4")):
        (runs / name).mkdir(parents=True)
        if name != "toy-4":
            save(runs / name / "last.pt", {"step": order})
            os.utime(runs / name / "last.pt", (order, order))
    last = runs / "toy-2" / "last.pt"
    assert find_resume(None, None, "toy", runs) is None
    assert find_resume(str(last), None, "toy", runs) == last
    assert find_resume(str(runs / "toy-2"), None, "toy", runs) == last
    assert find_resume("auto", str(runs / "toy-2"), "toy", runs) == last
    assert find_resume("auto", None, "toy", runs) == runs / "toy-1" / "last.pt"
    assert find_resume("auto", str(tmp_path / "new"), "toy", runs) is None
    assert find_resume("auto", None, "toy", tmp_path) is None
    for missing in (runs / "toy-4", tmp_path / "nothing.pt"):
        with pytest.raises(InputError, match=f"--resume {missing}: expected"):
            find_resume(str(missing), None, "toy", runs)


@pytest.mark.parametrize(
    ("number", "second", "status"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, SystemExit, 143)]
)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(number, second, status):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert not signals.stop_requested()
        signal.raise_signal(number)
        assert signals.stop_requested() and signals.exit_status == status
        with pytest.raises(second):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


class Killed(Dataset):
    """Sends its own process the signals that a terminal sends to the whole group."""

    def __getitem__(self, key: tuple[int, int]) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return key[1]


def test_loader_workers_outlive_the_signal_so_that_the_step_can_end():
    sampler = ResumableSampler(3, 1, seed=0)
    loader = make_loader(Killed(), sampler, torch.tensor, workers=1)
    with Signals() as signals:
        assert sorted(batch.tolist() for batch in loader) == [[0], [1], [2]]
    assert not signals.stop_requested()


def test_ranks_other_than_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    checkpoint.save(tmp_path / "last.pt", {"step": math.pi})
    assert list(tmp_path.iterdir()) == []
