"""Write a run as a folder for Hugging Face's transformers, and its parts as ONNX files.

    python -m fgclip.export runs/NAME/best.pt out
    python -m fgclip.export runs/NAME/best.pt out --onnx
    python -m fgclip.export WEIGHTS out --onnx                      # published weights, as in fgclip.evaluate

`transformers.CLIPModel` and `CLIPTokenizer` read the folder, and so do all commands of fgclip. What FG-CLIP has beside
CLIP stands in model.safetensors under its published names; adapters are merged. --onnx adds image.onnx, text.onnx,
text_long.onnx and regions.onnx, which are compared with the model before they are written. Needs the extra export.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops import roi_align

from fgclip.loading import load_model
from fgclip.model import FGCLIP, PIXEL_MEAN, PIXEL_STD, l2_normalize
from fgclip.regions import boxes_to_rois
from fgclip.synthetic import SyntheticRegions
from fgclip.tokenizer import END, NO_MERGES, START, Tokenizer
from fgclip.weights import hugging_face_config, save_clip_weights
from trainkit.arguments import make_parser
from trainkit.errors import InputError, one_sentence
from trainkit.files import whole_file, write_json, write_text
from trainkit.onnx_file import need_packages, onnx_file, onnx_function

TOLERANCE = 1e-4  # of the numbers of a unit feature


def regions(model: FGCLIP, pixels: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
    """`FGCLIP.encode_regions` in operators that ONNX has. boxes: (R, 4). image: (R,) int64, whose they are."""
    tokens, size = model.vision_model.penultimate(pixels)
    rois = torch.cat([image[:, None].to(boxes), boxes_to_rois([boxes], size)[:, 1:]], dim=1)
    cells = roi_align(model.vision_model.dense(tokens, size), rois, 1, 1.0, 0, True)  # (R, C, 1, 1)
    return getattr(model, "roi_projection", model.visual_projection)(cells.flatten(1))


def parts(model: FGCLIP, tokenizer: Tokenizer) -> Iterator[tuple[str, Callable, dict, dict, Tensor]]:
    """Name, function, inputs of drawn scenes, axes that may vary, and features that the model makes of the inputs."""
    samples = [*map(SyntheticRegions(3, seed=30_000, image_size=model.vision_model.image_size).__getitem__, range(3))]
    pixels, boxes = torch.stack([sample.pixels for sample in samples]), [sample.boxes for sample in samples]
    of_image, of_region = {"pixels": {0: Dim("batch", max=4096)}}, {0: Dim("regions", max=65536)}
    yield "image", model.encode_image, dict(pixels=pixels), of_image, model.encode_image(pixels)
    image = torch.arange(len(boxes)).repeat_interleave(torch.tensor([*map(len, boxes)]))
    inputs, axes = dict(pixels=pixels, boxes=torch.cat(boxes), image=image), dict(boxes=of_region, image=of_region)
    yield "regions", partial(regions, model), inputs, of_image | axes, model.encode_regions(pixels, boxes)
    lengths = dict(text=model.text_model.context_length, text_long=model.text_model.long_context_length)
    for name, length in lengths.items():
        if length is not None:
            encode = partial(model.encode_text, long=name == "text_long")
            tokens = tokenizer([sample.record.long for sample in samples], length)
            axes = {"tokens": {0: Dim("texts", max=4096), 1: Dim("length", max=length)}}
            yield name, encode, dict(tokens=tokens), axes, encode(tokens)


def checked(name: str, content: bytes, inputs: dict[str, Tensor], expected: Tensor) -> str:
    """A sentence on how a file compares with the model. Raises InputError where its unit features differ."""
    (found,) = onnx_function(content)(**inputs)
    off = (l2_normalize(found) - l2_normalize(expected)).abs().max().item()
    if not off <= TOLERANCE:
        raise InputError(f"{name} would not give the model's features: they differ by {off:.1e}; it is not written")
    return f"{name}: {len(expected)} unit features differ by at most {off:.1e}"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """vocab.json, merges.txt and tokenizer_config.json of transformers.CLIPTokenizer."""
    write_json(folder / "vocab.json", tokenizer.encoder)
    write_text(folder / "merges.txt", "".join(f"{line}\n" for line in (NO_MERGES, *map(" ".join, tokenizer.merges))))
    tokens = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=END)
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=length, do_lower_case=True, **tokens)
    write_json(folder / "tokenizer_config.json", config, indent=1)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Write the folder. arguments: without the program's name."""
    parser = make_parser(__doc__)
    # fmt: off
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's best.pt or last.pt, or published weights")
    add("output", type=Path, metavar="OUT", help="the folder to write")
    add("--onnx", action="store_true", help="also the towers and the region head as ONNX files")
    add("--base", metavar="PATH", help="of a run that was trained with --base: those weights, if they moved")
    add("--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged (EMA) weights if any, or raw ones")
    add("--vocab", metavar="FILE", help="published weights: the merges, as in fgclip.evaluate")
    # fmt: on
    args = parser.parse_args(arguments)
    if find_spec("safetensors") is None:
        raise InputError('safetensors is missing: pip install "macl-fgclip[export]"')
    if args.onnx:
        need_packages()
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"{args.output} is a file; expected a folder, or a name for one")
    model, tokenizer = load_model(args.run, args.vocab, weights=args.weights, base=args.base)
    side, folder = model.vision_model.image_size, args.output
    files = {}
    for name, function, inputs, axes, expected in parts(model, tokenizer) if args.onnx else ():
        module = nn.Module()
        module.model, module.forward = model, function
        files[f"{name}.onnx"] = onnx_file(module, inputs, axes, ["features"])
        print(checked(f"{name}.onnx", files[f"{name}.onnx"], inputs, expected))
    save_clip_weights(model, folder)
    config = hugging_face_config(model)
    config["text_config"] |= dict(bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.eos_id)
    write_json(folder / "config.json", config, indent=1)
    save_tokenizer(tokenizer, folder, model.text_model.context_length)
    pixels = dict(do_resize=True, size=dict(height=side, width=side), resample=3, do_center_crop=False)
    pixels |= dict(do_convert_rgb=True, do_rescale=True, do_normalize=True, image_mean=PIXEL_MEAN, image_std=PIXEL_STD)
    write_json(folder / "preprocessor_config.json", dict(image_processor_type="CLIPImageProcessor", **pixels), indent=1)
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


if __name__ == "__main__":
    with one_sentence():
        main()
