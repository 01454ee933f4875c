"""Shards: what is packed comes out again, what is damaged is counted or named, and training goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import FGCLIP as TINY
from scripts import equal, load, metrics, refused, run

import train_fgclip
from fgclip import pack
from fgclip.data.dataset import RegionDataset
from fgclip.data.records import FineHARD
from fgclip.data.shards import ShardDataset, Shards, expand, lengths_of
from fgclip.synthetic import SyntheticRegions
from trainkit.errors import InputError

COUNT = 40
FLAGS = [*TINY[: TINY.index("--synthetic-train")], *"--batch-size 4 --workers 0 --device cpu --vocab bytes".split()]
FLAGS += "--lr 0.004 --epochs 2 --warmup-steps 5 --validate-at= --region-weight 1 --val-share 0.1".split()
FLAGS += "--shuffle-buffer 16 --logit-scale-init 2.66".split()


def write_items(folder: Path, count: int) -> list[str]:
    """Drawn scenes as FineHARD's items, and the flags that name them."""
    scenes, items = SyntheticRegions(count, seed=0, image_size=32), []
    (folder / "images" / "deep").mkdir(parents=True)
    for i in range(count):
        record, pixels = scenes.record(i), scenes.picture(i).permute(1, 2, 0).numpy()
        Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / "images" / "deep" / f"{i}.x.png")
        boxes = [dict(bbox=region.box, short_expr=region.phrases[0], flag_short_neg=1,
                      short_expr_negs=dict(enumerate(region.negatives))) for region in record.regions]  # fmt: skip
        captions = dict(caption=record.long, short_caption=record.short[0])
        items.append(dict(f_path=f"deep/{i}.x.png", bbox_info=boxes, **captions))
    (folder / "items.json").write_text(json.dumps(items))
    return ["--annotations", str(folder / "items.json"), "--image-root", str(folder / "images")]


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("listed"), COUNT)


@pytest.fixture
def packed(listed, tmp_path, capsys):
    """The pattern of four shards of ten samples."""
    pack.main([*listed, "--output", str(tmp_path / "shards"), "--per-shard", "12"])
    (name,) = capsys.readouterr().out.split("--shards ")[1].split("'")[1:2]
    assert name == f"{tmp_path}/shards/data-{{000000..000003}}.tar"
    return name


def rewrite(shard: Path, change) -> None:
    """The shard with `change(name, content)` in the place of every file; None leaves one out. The index is stale."""
    with tarfile.open(shard) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    changed = {name: change(name, content) for name, content in files.items()}
    pack.write_shard(shard, [{name: content for name, content in changed.items() if content is not None}])
    shard.with_suffix(".index.npy").unlink()


def test_samples_are_those_of_the_list(listed, packed):
    plain = RegionDataset(FineHARD(listed[1]), listed[3], image_size=32)
    shards = ShardDataset(Shards([packed]), "", image_size=32)
    assert lengths_of(shards.records) == [10] * 4
    order = np.random.default_rng(0).permutation(COUNT)
    assert (np.diff(order) != 1).sum() > COUNT / 2
    for i, index in enumerate(order.tolist()):
        one, other = shards[i], plain[index]
        assert one.pixels.equal(other.pixels) and one.boxes.equal(other.boxes)
        assert (one.short, one.record.long, one.hard) == (other.short, other.record.long, other.hard)


def test_webdataset_reads_them(packed, listed):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(packed, shardshuffle=False).decode("pil"))
    items = json.loads(Path(listed[1]).read_text())
    assert len(samples) == COUNT and {sample["png"].size for sample in samples} == {(32, 32)}
    assert all(sample["json"] == items[int(sample["__key__"])] for sample in samples)


@pytest.mark.parametrize("content", [None, b"", b"no array", "stale"])
def test_an_index_that_is_not_there_or_does_not_fit_is_made_anew(packed, content):
    expected = [record.stored for record in Shards([packed])]
    for path in expand(packed):
        index = path.with_suffix(".index.npy")
        if content is None:
            index.unlink()
        elif content == "stale":
            np.save(index, np.load(index)[::-1])
        else:
            index.write_bytes(content)
    assert [record.stored for record in Shards([packed])] == expected


def test_a_damaged_shard_is_named(packed, tmp_path):
    shard = expand(packed)[2]
    whole, index = shard.read_bytes(), shard.with_suffix(".index.npy")
    with tarfile.open(shard) as archive:
        border = archive.getmembers()[5].offset
    index.unlink()
    header = whole[:border] + b"x" * 512 + whole[border + 512 :]
    for content in (whole[:border], whole[: border + 700], header, b"", b"\x1f\x8b" + whole, b"no tar" * 999):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=f"{shard} cannot be read to its end .*; expected a shard"):
            Shards([packed])
    shard.write_bytes(whole)
    with pytest.raises(InputError, match="data-000004.tar does not exist; expected a shard"):
        Shards([packed.replace("3}", "4}")])


def test_damaged_samples_are_left_out_and_counted(packed, tmp_path, capsys):
    """A picture that is cut, one that is missing, an item that is no json: of four, one is held out."""
    first = expand(packed)[0]

    def change(name, content):
        place = broken.setdefault(name[:9], len(broken))
        if place == 1 and name.endswith("png"):
            return content[:99]
        if place == 2 and name.endswith("png"):
            return None
        return b"{" if place == 3 and name.endswith("json") else content

    broken = {}
    rewrite(first, change)
    flags = [*FLAGS, "--shards", packed, "--epochs", 1]
    folder = run(train_fgclip, flags, tmp_path / "run", "--max-steps", 9)
    lines, output = metrics(folder), capsys.readouterr().out
    lost = sum(line["damaged"] for line in lines)
    assert lost == output.count("left out: ") == load(folder)["damaged"] == 3
    assert all(line["loss"] > 0 for line in lines) and "not valid JSON" in output and "cannot be decoded" in output
    assert "3 samples are damaged" not in output
    sentence = refused(capsys, train_fgclip.main, *flags, "--max-damaged", 2, "--output", tmp_path / "most")
    assert "--max-damaged 2: 3 samples are damaged, the last: " in sentence and "data-000000.tar, item" in sentence


def test_a_run_is_resumed_bit_for_bit_and_learns_what_the_list_teaches(packed, listed, tmp_path):
    whole = run(train_fgclip, [*FLAGS, "--shards", packed], tmp_path / "whole")
    halves = run(train_fgclip, [*FLAGS, "--shards", packed], tmp_path / "halves", "--max-steps", 11)
    train_fgclip.main(["--resume", str(halves), "--device", "cpu", "--max-steps", "99"])
    assert metrics(whole) == metrics(halves) and equal(load(whole)["model"], load(halves)["model"])
    other = run(train_fgclip, [*FLAGS, *listed], tmp_path / "listed")
    ends = [np.mean([line["loss"] for line in metrics(folder)[-9:]]) for folder in (whole, other)]
    assert len(metrics(whole)) == 18 and ends[0] == pytest.approx(ends[1], rel=0.15)
    assert max(ends) < 0.6 * metrics(whole)[0]["loss"]


def test_what_does_not_fit_is_refused(packed, listed, tmp_path, capsys):
    def say(*flags, command=train_fgclip.main):
        return refused(capsys, command, *flags, "--output", tmp_path / "none")

    assert "--shards bring annotations" in say(*FLAGS, "--shards", packed, *listed)
    flags = [*FLAGS, "--shards", packed, "--val-annotations", listed[1], "--output", tmp_path / "lost"]
    assert "is the image root right?" in refused(capsys, train_fgclip.main, *flags)
    folder = run(train_fgclip, [*FLAGS, "--shards", packed], tmp_path / "run", "--max-steps", 1)
    expand(packed)[3].unlink()
    assert "data-000003.tar does not exist" in refused(capsys, train_fgclip.main, "--resume", folder)
    sentence = refused(capsys, train_fgclip.main, "--resume", folder, "--shards", packed.replace("3}", "2}"))
    assert "the place in the data is lost" in sentence
    assert "expected a new or an empty folder" in refused(capsys, pack.main, *listed, "--output", folder)
    items = json.loads(Path(listed[1]).read_text())
    del items[3]["caption"]
    items[4]["f_path"] = "gone.png"
    items[5]["f_path"] = "../items.json"
    (tmp_path / "items.json").write_text(json.dumps(items))
    flags = ["--annotations", tmp_path / "items.json", *listed[2:]]
    assert "; --max-damaged 2" in say(*flags, "--max-damaged", 2, command=pack.main)
    pack.main([str(flag) for flag in (*flags, "--max-damaged", 3, "--output", tmp_path / "three")])
    assert capsys.readouterr().out.count("left out: ") == 3 and len(Shards([f"{tmp_path}/three/data-000000.tar"])) == 37


@pytest.mark.slow
def test_a_run_that_is_killed_loses_and_doubles_nothing(packed, tmp_path):
    """kill -9 with workers: the resumed run goes on from its last checkpoint with the next sample."""
    flags = [*FLAGS, "--shards", packed, "--save-every", 4, "--workers", 2]
    whole = run(train_fgclip, flags, tmp_path / "whole")
    command = [sys.executable, train_fgclip.__file__, *map(str, flags), "--output", str(tmp_path / "killed")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: more of them add up in another order
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=one_thread)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and '"step": 14' in log.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train_fgclip.main(["--resume", str(tmp_path / "killed"), "--device", "cpu"])
    assert metrics(whole) == metrics(tmp_path / "killed")
