"""The page about runs, read as a browser would: balanced tags, nothing from outside, everything escaped."""

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scripts import refused

from trainkit.errors import InputError
from trainkit.log import RunLog
from trainkit.report import draw, families, main, read_runs

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and rows of table cells; fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.rows += [[]] if tag == "tr" else []
        if self.rows and tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.rows and {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == first)


def write_run(folder, *, arguments=None, steps=12, name="loss_classifier", picture=True):
    """A run as the scripts leave it."""
    folder.mkdir(parents=True)
    record = {
        "script": "stage2", "arguments": {"lr": 0.01, "anchor_sizes": [8, 16]} | (arguments or {}),
        "started": "2026-01-02T03:04:05+0000", "command": ["stage2", "--lr", "0.01"], "commit": None,
        "device": "x86_64", "versions": {"torch": "2.15.0"}, "resumed": [],
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(record))
    log = RunLog(folder, total_steps=steps, tensorboard=False, every=100)
    for step in range(1, steps + 1):
        loss = math.nan if step == 6 else 1 / step
        log.train(step, {"epoch": 1, "loss": 2 / step, name: loss, "lr": 0.01, "grad_norm": 10.0**-step})
        if step % 4 == 0:
            ap50 = {"ap50": step / steps, "miss_rate": {"reasonable": 50 - step}}
            values = {mode: ap50 for mode in ("both", "visible", "infrared")}
            log.write("validation", step, {"epoch": 1, **values, "alignment": {"r1": 0.5 + step / 100}})
    log.close()
    if picture:
        (folder / "pictures").mkdir()
        Image.new("RGB", (40, 20), (200, 10, 10)).save(folder / "pictures" / "tsne-001.png")
    return folder


def show(tmp_path, *flags) -> Page:
    main([*map(str, flags), "--output", str(tmp_path / "page.html")])
    return Page((tmp_path / "page.html").read_text())


def test_a_page_of_one_run_holds_everything_and_needs_nothing_from_outside(tmp_path, capsys):
    page = show(tmp_path, write_run(tmp_path / "one"))
    assert "1 run, 0.1 MiB" in capsys.readouterr().out
    for title in ("Runs", "Validation", "Training", "Pictures", "Arguments", "Machine"):
        assert title in page.text
    assert page.row("one") == ["stage2", "2026-01-02T03:04:05+0000", "12", "0.1667", ""]
    assert page.row("ap50") == ["1", "1", "1"] and page.row("miss_rate / reasonable") == ["38", "38", "38"]
    assert page.row("alignment / r1") == ["0.62"]
    assert page.row("anchor_sizes") == ["[8, 16]"] and page.row("versions") == ['{"torch": "2.15.0"}']
    assert "Without change: lr 0.01." in page.text and "loss_classifier 1 not drawn" in page.text
    text = re.sub('"data:image/jpeg;base64,[A-Za-z0-9+/=]+"', "", (tmp_path / "page.html").read_text())
    assert not re.search(r"https?:|//|url\([^#]|@import|base64", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    drawn = [tag for tag, _ in page.tags].count("svg")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert drawn == len(set(ids)) == len(ids) == 6
    before = (tmp_path / "page.html").read_bytes()
    show(tmp_path, tmp_path / "one")
    assert (tmp_path / "page.html").read_bytes() == before


def test_what_a_run_says_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>\"&<img src=x onerror=y>"
    run = write_run(tmp_path / 'a <b>&" run', arguments={evil: evil, "note": evil}, name=f"loss_{evil}")
    (run / "pictures" / "tsne-001.png").rename(run / "pictures" / '<i>"x=".png')
    (run / "pictures" / "bad<u>.png").write_text("no picture")
    page = show(tmp_path, run, write_run(tmp_path / "other"))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert page.row(evil) == [evil, ""] and f"loss_{evil}" in page.text
    assert 'a <b>&" run' in page.text and 'pictures/<i>"x=".png' in page.text
    assert "pictures/bad<u>.png cannot be shown: " in page.text


def test_several_runs_stand_side_by_side(tmp_path):
    first = write_run(tmp_path / "x" / "run")
    second = write_run(tmp_path / "y" / "run", arguments={"lr": 0.02, "note": None}, steps=8)
    page = show(tmp_path, first, second)
    assert page.row("x/run") and page.row("y/run")
    assert page.row("ap50") == ["1", "1"] * 3 and page.row("alignment / r1") == ["0.62", "0.58"]
    assert page.row("lr") == ["0.01", "0.02"] and page.row("note") == ["", "null"]
    rows = [row[0] for row in page.rows]
    assert rows.index("lr") < rows.index("note") < rows.index("anchor_sizes")
    assert "text differs" in [attributes.get("class") for tag, attributes in page.tags if tag == "table"]
    assert [tag for tag, _ in page.tags].count("img") == 2 and "visible / ap50" in page.text
    assert "visible / ap50" not in show(tmp_path, second).text


def test_a_half_written_last_line_is_said_and_any_other_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "killed")
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 13, "lo')
    page = show(tmp_path, run)
    number = whole.count("\n") + 1
    said = f"line {number} of metrics.jsonl, the last one, is half written and was left out"
    assert said in page.text and said in capsys.readouterr().err
    assert page.row("killed")[2] == "12"
    for broken in ('{"step": 13, "lo', "[1]", '{"loss": 1}', '{"step": NaN}', '{"step": "x"}'):
        path.write_text(broken + "\n" + whole)
        with pytest.raises(InputError, match="metrics.jsonl: line 1 is not a json object with a step"):
            read_runs([run])


def test_bad_input_is_one_sentence_and_exit_status_2(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    outside = write_run(tmp_path / "outside")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    broken = write_run(tmp_path / "broken")
    (broken / "args.json").write_text("{")

    assert "nothing: expected the folder of a run" in refused(capsys, main, tmp_path / "nothing")
    assert "args.json: expected the folder of a run" in refused(capsys, main, run / "args.json")
    assert "holds neither args.json nor metrics.jsonl" in refused(capsys, main, tmp_path / "empty")
    assert "leads out of the run's folder" in refused(capsys, main, linked)
    assert "args.json is not valid JSON" in refused(capsys, main, broken)
    assert "ends with .html" in refused(capsys, main, run, "--output", tmp_path / "last.pt")
    assert "cannot be written (No such file" in refused(capsys, main, run, "--output", tmp_path / "no" / "page.html")
    assert "whole number" in refused(capsys, main, run, "--pictures", "-1")
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.partial"))


def test_a_run_that_has_only_begun_or_lost_its_arguments(tmp_path):
    begun, lost = write_run(tmp_path / "begun"), write_run(tmp_path / "lost")
    (begun / "metrics.jsonl").unlink()
    (lost / "args.json").unlink()
    page = show(tmp_path, begun, lost)
    assert page.row("begun")[-1] == "there is no metrics.jsonl, nothing has been logged"
    assert page.row("lost")[-1] == "there is no args.json, so the arguments are not known"


def test_pictures_are_made_small_thinned_and_stay_in_the_folder(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", picture=False)
    pictures = run / "pictures"
    pictures.mkdir()
    for number in (1, 2, 10, 100):
        Image.new("RGB", (2000, 1000), (number, 0, 0)).save(pictures / f"tsne-{number}.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(pictures / "clear.png")
    monkeypatch.setattr("trainkit.files.MAX_PIXELS", 3_000_000)
    Image.new("1", (2000, 2000)).save(pictures / "huge.png")
    page = show(tmp_path, run, "--pictures", "3")
    captions = re.findall(r"pictures/(\S+) run", page.text)
    assert captions == ["clear.png", "tsne-1.png", "tsne-10.png", "tsne-100.png"]
    assert "2000 x 2000 pixels; at most 3000000" in page.text
    sources = [attributes["src"].split(",")[1] for tag, attributes in page.tags if tag == "img"]
    assert Image.open(io.BytesIO(base64.b64decode(sources[1]))).size == (900, 450)
    assert "img" not in {tag for tag, _ in show(tmp_path, run, "--pictures", "0").tags}


def test_null_is_a_gap_and_a_lonely_point_still_shows():
    values = np.array([1, 2, np.nan, 3, np.nan, 4])
    svg = draw([(np.arange(6.0), values)], False, salt="one")
    line, dots = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: #0072b2', svg)
    assert line.count("M") == 3 and line.count("L") == 1
    heights = [float(y) for y in re.findall(r"M \S+ (\S+)", dots)]
    assert len(heights) == 4 and heights == sorted(heights, reverse=True)  # up is a smaller y
    assert "linecap: round" in svg and "<use" not in svg


def test_on_a_log_axis_what_is_not_positive_is_left_out():
    values = np.array([1.0, 0.0, 10.0, 100.0])
    svg = draw([(np.arange(4.0), values), (np.arange(4.0), -values)], True, salt="one")
    _, dots = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: #0072b2', svg)
    one, ten, hundred = (float(y) for y in re.findall(r"M \S+ (\S+)", dots))
    assert one - ten == pytest.approx(ten - hundred)


def test_a_long_run_makes_a_small_page(tmp_path):
    run = write_run(tmp_path / "run", picture=False)
    numbers = np.random.default_rng(0).random(20_000).tolist()
    with (run / "metrics.jsonl").open("w") as file:
        for step, value in enumerate(numbers, 1):
            values = {f"loss_{i}": value * i for i in range(8)}
            file.write(json.dumps({"step": step, "epoch": 1, "kind": "train", **values}) + "\n")
    show(tmp_path, run)
    assert (tmp_path / "page.html").stat().st_size < 500_000


@pytest.mark.parametrize("values", [[1e-12, 3e-12], [1e99, -1e99], [1e300, 1.0, 2.0], [10**400, None, 1, 2]])
def test_odd_ranges_are_drawn(values, tmp_path):
    lines = [json.dumps({"step": step * 2**50, "kind": "train", "x": value}) for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = str(show(tmp_path, tmp_path).tags)
    assert "svg" in text and "nan" not in text


def test_without_matplotlib_the_report_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="needs matplotlib: pip install"):
        show(tmp_path, write_run(tmp_path / "run"))


def test_names_that_differ_in_one_key_share_a_chart():
    two_sets = [("validation", data, mode, "ap50") for data in ("llvip", "kaist") for mode in ("both", "visible")]
    assert [family[1] for family in families(two_sets)] == ["llvip", "kaist"]
