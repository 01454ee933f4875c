"""Videos whose features are kept are evaluated without their files."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from fgclip import evaluate_video
from fgclip.video.features import INPUTS, Clips, FeatureStore
from fgclip.video.metrics import VideoScores
from fgclip.video.records import VideoRecord, VideoSet
from trainkit.errors import InputError

KEY = dict(dim=3, clip_frames=4)


def scores(record, clips):
    return VideoScores(record.name, record.classes, (), clips.frames, 4, *np.ones((2, 2, 3)) * [[[0.1]], [[0.5]]]), None


def test_features_do_without_the_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoSet, "open", lambda self, record: pytest.fail(f"{record.name} is opened"))
    store, width = FeatureStore(tmp_path, KEY), dict(zip(INPUTS, (3, 3, 4), strict=True))
    store.write("kept", Clips({name: np.ones((2, n), np.float16) for name, n in width.items()}, 8, Fraction(30)))
    model, encoder = SimpleNamespace(scores=scores), SimpleNamespace(key=KEY)
    videos = VideoSet([VideoRecord(name, None, (), ()) for name in ("kept", "gone")], ())
    with pytest.raises(InputError, match=r"^1 videos are missing or damaged .*: gone \(missing\)$"):
        evaluate_video.scored(model, encoder, videos, tmp_path, 0)
    found, lost = evaluate_video.scored(model, encoder, videos, tmp_path, 1)
    assert [one.name for one in found] == ["kept"] and lost == ["gone (missing)"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = [VideoScores("kept", (), (), 8, 4, np.array([0.1, 0.5]), np.ones((2, 3)))]
    evaluate_video.draw(tmp_path / "curves.png", found, videos)  # a curve without frames below
    assert (tmp_path / "curves.png").stat().st_size > 1000
