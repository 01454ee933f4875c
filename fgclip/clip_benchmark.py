"""Evaluate a run or published weights by LAION's clip-benchmark, which is installed apart: pip install clip-benchmark.

python -m fgclip.clip_benchmark eval --model short --pretrained runs/NAME/best.pt --dataset cifar10 --dataset_root data

The flags are those of clip_benchmark. --pretrained: what `load_model` reads. --model: short, or long for the long text
path. Images are squashed to the model's square, as FG-CLIP does.
"""

import sys
from functools import partial

import torch

from fgclip.images import preprocess
from fgclip.loading import load_model
from fgclip.model import FGCLIP
from trainkit.errors import InputError, one_sentence


def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: torch.device | str = "cpu"):
    """clip-benchmark's loading function: the model, what makes pixels of a picture, and tokens (N, L) of texts.

    Raises InputError on another name, and on "long" where the model has no long text path.
    """
    model, tokenizer = load_model(pretrained)
    lengths = dict(short=model.text_model.context_length, long=model.text_model.long_context_length)
    if lengths.get(model_name) is None:
        raise InputError(f"--model {model_name}: expected short, or long where the weights have a long text path")
    model.encode_text = partial(FGCLIP.encode_text, model, long=model_name == "long")
    pixels = partial(preprocess, size=model.vision_model.image_size)
    return model.to(device), pixels, partial(tokenizer, context_length=lengths[model_name])


def main() -> None:
    """clip_benchmark's own command, with one more kind of model."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        raise InputError(f"clip_benchmark cannot be imported ({error}): pip install clip-benchmark") from error
    models.TYPE2FUNC["fgclip"] = load
    models.MODEL_TYPES.append("fgclip")
    sys.argv += ["--model_type", "fgclip"] * (sys.argv[1:2] == ["eval"])
    cli.main()


if __name__ == "__main__":
    with one_sentence():
        main()
