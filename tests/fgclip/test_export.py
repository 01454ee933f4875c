"""`python -m fgclip.export`: what transformers and ONNX Runtime make of the folder, and how its parts are compared."""

import json

import pytest
import scripts
import torch

from fgclip import Tokenizer, export, load_model
from fgclip.lora import add_lora
from fgclip.synthetic import PHRASES, vocabulary
from trainkit.errors import InputError

TEXTS = [*PHRASES[:9], "A Photo of a CAT, isn't it? 1234 naïve 東京 don't  stop"]


@pytest.fixture(scope="module", params=["adapters", "bytes"])
def exported(request, tmp_path_factory, model):
    """A run's checkpoint, with adapters and merges or without either, and the folder that is made of it."""
    folder = tmp_path_factory.mktemp("export")
    merges, adapters = (vocabulary(), True) if request.param == "adapters" else ([], False)
    kwargs = model.config | dict(roi_projection=not adapters)
    kwargs["text"] = kwargs["text"] | dict(vocab_size=Tokenizer(merges or "bytes").vocab_size)
    torch.manual_seed(1)
    run = type(model)(**kwargs)
    if adapters:
        add_lora(run, ["q_proj", "fc1"], rank=2, alpha=4.0, dropout=0.0)
    with torch.no_grad():
        for parameter in run.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    content = dict(script="fgclip", model_kwargs=kwargs, model=run.state_dict(), ema=None, merges=merges)
    torch.save(content, folder / "run.pt")
    export.main([str(folder / "run.pt"), str(folder / "out")])
    return folder


@pytest.fixture
def both(exported):
    """The run and the folder, read by this project: (model, tokenizer) each."""
    return load_model(exported / "run.pt"), load_model(exported / "out")


@torch.no_grad()
def test_the_folder_reads_back_with_equal_features(both):
    (model, tokenizer), (again, its_tokenizer) = both
    pixels, boxes = torch.randn(2, 3, 32, 32), [torch.tensor([[0.1, 0.2, 0.7, 0.9]])] * 2
    ids = tokenizer(TEXTS, 40)
    assert its_tokenizer(TEXTS, 40).equal(ids) and not again.load_report.made
    for call in (
        lambda one: one.encode_image(pixels),
        lambda one: one.encode_regions(pixels, boxes),
        lambda one: one.encode_text(ids),
        lambda one: one.encode_text(ids, long=True),
    ):
        assert torch.equal(call(model), call(again))
    assert again.log_scales()["hard"] == model.log_scales()["hard"]


@pytest.mark.slow
@torch.no_grad()
def test_transformers_reads_the_folder_with_equal_features_and_ids(exported, both):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (model, tokenizer), _ = both
    theirs = transformers.CLIPModel.from_pretrained(exported / "out").eval()
    words = transformers.CLIPTokenizer.from_pretrained(exported / "out")
    given = words(TEXTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    ours = tokenizer(TEXTS, 40)
    for row, other, read in zip(ours, given["input_ids"], given["attention_mask"].sum(1).tolist(), strict=True):
        assert row[:read].equal(other[:read]) and not row[read:].any()
    pixels = torch.randn(2, 3, 32, 32)
    for found, expected in (
        (theirs.get_image_features(pixel_values=pixels), model.encode_image(pixels)),
        (theirs.get_text_features(**given), model.encode_text(ours)),
    ):
        torch.testing.assert_close(getattr(found, "pooler_output", found), expected, rtol=0, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(exported / "out")
    assert processor(torch.zeros(3, 40, 50), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def drawn(model, tokenizer):
    """What the text tower is compared on."""
    return next(
        (inputs, expected) for name, *_, inputs, _, expected in export.parts(model, tokenizer) if name == "text"
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("exported", ["bytes"], indirect=True)
def test_onnx_files_give_the_features_for_other_numbers_of_inputs(exported, tmp_path, both, capsys):
    pytest.importorskip("onnxruntime")
    export.main([str(exported / "run.pt"), str(tmp_path), "--onnx"])
    assert capsys.readouterr().out.count("unit features differ by at most") == 4
    (model, tokenizer), _ = both
    run = {
        name: export.onnx_function((tmp_path / f"{name}.onnx").read_bytes()) for name in ("image", "text", "regions")
    }
    pixels, ids = torch.randn(1, 3, 32, 32), tokenizer(TEXTS, 23)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.01, 1.0], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    for (found,), expected in (
        (run["image"](pixels=pixels), model.encode_image(pixels)),
        (run["text"](tokens=ids), model.encode_text(ids)),
        (
            run["regions"](pixels=pixels, boxes=boxes, image=torch.zeros(4).long()),
            model.encode_regions(pixels, [boxes]),
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    inputs, expected = drawn(model, tokenizer)
    content = (tmp_path / "text.onnx").read_bytes()
    assert "text" in export.checked("text", content, inputs, expected)
    model.text_model.final_layer_norm.weight[3] += 0.1
    with pytest.raises(InputError, match="it is not written"):
        export.checked("text", content, *drawn(model, tokenizer))


def test_what_does_not_fit_is_refused(exported, tmp_path, capsys, monkeypatch):
    assert "does not exist" in scripts.refused(capsys, export.main, tmp_path / "none.pt", tmp_path / "out")
    assert "is a file" in scripts.refused(capsys, export.main, exported / "run.pt", exported / "run.pt")
    monkeypatch.setattr("trainkit.onnx_file.find_spec", lambda name: None)
    message = scripts.refused(capsys, export.main, exported / "run.pt", tmp_path / "out", "--onnx")
    assert "need onnx, onnxruntime, onnxscript: pip install" in message and not (tmp_path / "out").exists()
    assert json.loads((exported / "out/config.json").read_text())["model_type"] == "clip"
