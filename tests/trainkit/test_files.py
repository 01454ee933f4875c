"""Pictures come out as 8-bit RGB as they are shown, or are refused; what else is read is held by the fuzz tests."""

import logging
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from trainkit import files
from trainkit.errors import InputError
from trainkit.files import open_image


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_formats_and_modes_come_out_as_three_channels(tmp_path, suffix, mode):
    Image.new("RGB", (8, 6), (102, 102, 102)).convert(mode).save(tmp_path / f"a{suffix}", lossless=True)
    image = np.asarray(open_image(tmp_path / f"a{suffix}"))
    assert image.shape == (6, 8, 3) and abs(image.astype(int) - 102).max() <= 1


def test_a_picture_that_is_stored_turned_is_opened_as_shown(tmp_path):
    exif, image = Image.Exif(), Image.radial_gradient("L").resize((8, 6))
    exif[0x0112] = 6  # to be turned by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").getchannel(0).tobytes() == image.tobytes()


def test_large_and_deep_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("I;16", (8, 6), 40000).save(tmp_path / "deep.png")
    monkeypatch.setattr(files, "MAX_PIXELS", 1199)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"a\.png has 40 x 30 pixels; at most 1199"):
        open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits"):
        open_image(tmp_path / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what Pillow itself holds for a decompression bomb
    with pytest.raises(InputError, match=r"a\.png"):
        open_image(tmp_path / "a.png")


def test_what_pillow_logs_of_damage_does_not_reach_the_terminal(tmp_path, monkeypatch):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    samples = struct.pack("<HHI", 277, 3, 1)  # tag, type and count of the samples per pixel, before their number
    assert samples in data
    (tmp_path / "a.tif").write_bytes(data.replace(samples + b"\3\0", samples + b"\0\x08"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging, "lastResort", logging.Handler())  # where a record without any handler goes
    messages = []
    logging.lastResort.emit = messages.append
    with pytest.raises(InputError, match=r"a\.tif"):
        open_image(tmp_path / "a.tif")
    assert not messages
