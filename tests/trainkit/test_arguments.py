"""Flags and their types, the folder of a run, and how --resume finds it again."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from trainkit import arguments
from trainkit.arguments import add_recipe_flags, make_parser, parse_with_resume
from trainkit.checkpoint import save
from trainkit.errors import InputError, one_sentence
from trainkit.run_folder import find_resume, prepare_run


def parser(**defaults) -> argparse.ArgumentParser:
    made = make_parser("What it does.\n\n    python toy.py --epochs 3\n")
    add_recipe_flags(made, "toy", ("notes",))
    made.add_argument("--notes")
    made.add_argument("--sizes", type=arguments.int_list, nargs=2)
    made.set_defaults(**defaults)
    return made


def test_help_shows_lines_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parser(epochs=26, lr=0.02).parse_args(["--help"])
    text = capsys.readouterr().out
    assert "    python toy.py --epochs 3\n" in text
    assert "passes over the training set (default: 26)" in text
    assert "(default: 0.0)" in text and "(default: 8,11)" in text
    assert "None" not in text and "False" not in text
    assert "--check " in text and "only these may change: --best-by, --data-root" in " ".join(text.split())


@pytest.mark.parametrize(("kind", "good", "bad"), [
    ("positive_int", {"3": 3}, ("0", "-1", "1.5", "x", "")),
    ("non_negative_int", {"0": 0}, ("-1", "1e3")),
    ("positive_float", {"1e-3": 0.001}, ("0", "inf", "nan", "-1")),
    ("non_negative_float", {"0": 0.0}, ("-0.1", "inf", "nan")),
    ("fraction", {"1": 1.0}, ("1.01", "-0.1", "nan")),
    ("below_one", {"0": 0.0}, ("1", "nan")),
    ("int_list", {"16,22": [16, 22], "": []}, ("1,", "1;2", "-1", "a")),
])  # fmt: skip
def test_a_bad_value_gets_one_sentence_and_status_2(kind, good, bad, capsys):
    made = make_parser("Toy.")
    made.add_argument("--value", type=getattr(arguments, kind))
    for text, value in good.items():
        assert made.parse_args([f"--value={text}"]).value == value
    for text in bad:
        with pytest.raises(SystemExit) as stopped:
            made.parse_args([f"--value={text}"])
        assert stopped.value.code == 2
        assert "argument --value: expected" in capsys.readouterr().err.splitlines()[-1]


def test_flags_are_not_shortened(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--epoch", "3"])
    assert "--epoch 3" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*flags: str):
    args = parse_with_resume(parser(), ["--device", "cpu", *flags], "toy", {})
    return args, prepare_run(args, "toy", may_change=("notes",))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())


def test_each_run_gets_a_folder_that_says_how_it_began():
    args, first = prepare("--lr", "0.5", "--milestones", "3,4")
    _, second = prepare()
    assert first != second and {first.parent, second.parent} == {Path("runs")}
    assert all(folder.name.startswith("toy-") for folder in (first, second))
    record = record_of(first)
    assert record["script"] == "toy" and record["world_size"] == 1 and record["versions"]["torch"] == torch.__version__
    assert record["arguments"]["lr"] == 0.5 and record["arguments"]["milestones"] == [3, 4]
    assert record["arguments"]["output"] == args.output == str(first)
    assert {path.name for path in first.iterdir()} == {".lock", "args.json"}


def test_a_folder_in_use_is_refused(tmp_path):
    _, folder = prepare("--output", str(tmp_path / "mine"))
    before = (folder / "args.json").read_text()
    with pytest.raises(InputError, match=f"--output {folder}: already holds files; .* or continue with --resume"):
        prepare("--output", str(folder), "--lr", "7")
    assert (folder / "args.json").read_text() == before
    with pytest.raises(InputError, match="expected a folder, found a file"):
        prepare("--output", str(folder / "args.json"))


def test_ctrl_c_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, one_sentence():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and stopped.value.__suppress_context__
    assert capsys.readouterr().err == "interrupted\n"


def test_resume_continues_in_the_folder_of_the_checkpoint(tmp_path):
    _, folder = prepare()
    _, other = prepare()
    save(folder / "last.pt", {"step": 5})
    for flags in ([str(folder)], [str(folder / "last.pt")], ["auto", "--output", str(folder)], ["auto"]):
        args, again = prepare("--epochs", "40", "--resume", *flags)
        assert again == folder and args.resume == str(folder / "last.pt")
    record = record_of(folder)
    assert record["arguments"]["epochs"] == 12 and len(record["resumed"]) == 4
    with pytest.raises(InputError, match="--init-from: a resumed run"):
        prepare("--resume", str(folder), "--init-from", "other.pt")
    with pytest.raises(InputError, match="already holds files"):
        prepare("--resume", str(folder), "--output", str(other))
    args, elsewhere = prepare("--resume", str(folder), "--output", str(tmp_path / "copy"))
    assert elsewhere == tmp_path / "copy" and args.resume == str(folder / "last.pt")
    assert len(record_of(elsewhere)["resumed"]) == 5


def test_a_resumed_run_keeps_its_flags_but_for_those_that_may_change():
    flags = "--lr 0.5 --sizes 1,2 3 --notes first --max-steps 7 --milestones 3"
    _, folder = prepare(*flags.split())
    save(folder / "last.pt", {"step": 5})
    args, again = prepare("--resume", "auto", "--notes", "second", "--epochs", "20")
    assert again == folder and (args.lr, args.sizes, args.milestones) == (0.5, [[1, 2], [3]], [3])
    assert args.notes == "second" and args.epochs == 20 and args.max_steps is None
    with pytest.raises(InputError, match=r"--lr is 0\.1, but the run in .* began with 0\.5"):
        prepare("--lr", "0.1", "--resume", "auto")


WRONG = {"epochs": ([1], "x", None), "lr": (-1.0,), "amp": ("fp8",), "check": (3,), "sizes": ([[1]], [1, "x"])}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_damaged_record_of_flags_is_refused(name, value):
    _, folder = prepare()
    save(folder / "last.pt", {"step": 5})
    record = record_of(folder)
    record["arguments"][name] = value
    (folder / "args.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"args.json: {name}: .* is no value of the flag"):
        prepare("--resume", "auto")


def test_resume_auto_starts_again_where_a_run_ended_before_its_first_checkpoint(tmp_path, capsys):
    flags = ("--output", str(tmp_path / "mine"), "--resume", "auto")
    _, folder = prepare(*flags)
    args, again = prepare(*flags, "--lr", "0.5")
    assert again == folder and args.resume is None and "starting fresh" in capsys.readouterr().out
    assert record_of(folder)["arguments"]["lr"] == 0.5
    (folder / "args.json").rename(folder / "thesis.txt")
    with pytest.raises(InputError, match="already holds files"):
        prepare(*flags)


def test_resume_takes_a_file_a_folder_or_finds_the_run(tmp_path):
    runs = Path("runs")
    for order, name in enumerate(("toy-2", "toy-1", "other-3")):
        (runs / name).mkdir(parents=True)
        save(runs / name / "last.pt", {"step": order})
        os.utime(runs / name / "last.pt", (order, order))
    (runs / "toy-4").mkdir()
    last = runs / "toy-2" / "last.pt"
    assert find_resume(None, None, "toy") is None
    assert find_resume(str(last), None, "toy") == find_resume(str(runs / "toy-2"), None, "toy") == last
    assert find_resume("auto", str(runs / "toy-2"), "toy") == last
    assert find_resume("auto", None, "toy") == runs / "toy-1" / "last.pt"
    assert find_resume("auto", str(tmp_path / "new"), "toy") is None
    assert find_resume("auto", None, "fresh") is None
    for missing in (runs / "toy-4", tmp_path / "nothing.pt"):
        with pytest.raises(InputError, match=f"--resume {missing}: expected"):
            find_resume(str(missing), None, "toy")
