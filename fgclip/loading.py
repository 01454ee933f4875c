"""A model and the tokenizer that belongs to it, from a training run's checkpoint or from published weights."""

import os
from collections.abc import Sequence
from pathlib import Path

from fgclip.model import FGCLIP
from fgclip.tokenizer import Tokenizer, checked_merges
from fgclip.weight_files import read_run
from fgclip.weights import build, load_clip_weights, weights_hash
from trainkit.errors import InputError
from trainkit.files import reason, state_dict_of
from trainkit.load_report import LoadReport

MAX_IMAGE_SIZE = 4096  # pixels, of the square that a model is shown
MERGE_FILES = ("tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")


def load_model(
    path: str | Path, vocab: str | Path | None = None, *, weights: str = "ema", trust_torchscript: bool = False,
    heads: Sequence[int] | None = None, activation: str | None = None, base: str | Path | None = None,
) -> tuple[FGCLIP, Tokenizer]:  # fmt: skip
    """The model, in evaluation mode on the CPU, and its tokenizer.

    path: a checkpoint of train_fgclip.py or train_video.py, which holds its tokenizer, or whatever `load_clip_weights`
        reads.
    vocab: for published weights, the merges as in `Tokenizer`; by default a file of them beside the weights, else those
        of an installed CLIP package.
    weights: for a run, "ema" takes the averaged weights where there are any, "raw" the trained ones.
    trust_torchscript, heads, activation: for published weights, as in `load_clip_weights`.
    base: of a checkpoint made by `beside`, where its base weights are now.
    Raises InputError on files of another kind, and where tokenizer and weights differ in their vocabulary.
    """
    path, options = Path(path), dict(trust_torchscript=trust_torchscript, heads=heads, activation=activation)
    run = read_run(path)
    if base is not None and (run is None or "base" not in run):
        raise InputError(f"--base {base}: {path} is whole; expected a checkpoint that was trained with --base")
    if run is None:
        model = load_clip_weights(path, **options)
        return model.eval(), published_tokenizer(path, vocab, model.text_model.vocab_size)
    for flag, value in (("--vocab", vocab), ("--heads", heads), ("--activation", activation)):
        if value is not None and (flag == "--vocab" or "base" not in run):
            raise InputError(f"{flag}: the run's checkpoint {path} brings its own tokenizer, heads and activation")
    script = run.get("script")
    if script not in ("fgclip", "video"):
        raise InputError(f"{path} is a checkpoint of train_{script}.py; expected one of train_fgclip.py")
    if lacking := [key for key in ("model", "merges") if key not in run]:
        raise InputError(f"{path} lacks {', '.join(lacking)}, which a checkpoint of train_{script}.py holds")
    state = run["ema"] if weights == "ema" and run.get("ema") is not None else run["model"]
    if state != {} or "base" not in run:  # where nothing differs from the base
        state = state_dict_of(state, path)
    if script == "video":  # the towers beside the head
        state = {name.removeprefix("fgclip."): x for name, x in state.items() if name.startswith("fgclip.")}
    if "base" in run:
        state = completed(state, run["base"], path, base, **options)
    model = build(run["model_kwargs"], state, f"{path} (damaged, or written by another version of the model)")
    model.load_report = LoadReport(str(path), list(state))
    merges, vocab_size = checked_merges(run["merges"], str(path)), model.text_model.vocab_size
    if Tokenizer(merges).vocab_size > vocab_size:
        raise InputError(f"{path}: more merges than the model's {vocab_size} tokens")
    return model.eval(), Tokenizer(merges, vocab_size=vocab_size)


def load_base(path: str | Path, **options) -> FGCLIP:
    """The model that `load_model` reads there, without a tokenizer. options: those of `load_clip_weights`."""
    try:
        return load_clip_weights(Path(path), **options) if read_run(Path(path)) is None else load_model(path)[0]
    except InputError as error:
        raise InputError(f"--base: {error}") from error


def beside(state: dict, base: FGCLIP, path: str) -> dict:
    """A run's checkpoint without what it shares with the base weights at `path`: to be loaded, not to be resumed."""
    known, kept = base.state_dict(), {name: state[name] for name in ("script", "model_kwargs", "merges")}
    for part in ("model", "ema"):
        own = {name: x for name, x in (state[part] or {}).items() if not (name in known and x.cpu().equal(known[name]))}
        kept[part] = None if state[part] is None else own
    names = [name for name in state["model"] if name in known]
    return kept | dict(base=dict(path=os.path.abspath(path), hash=weights_hash(base, ("",)), names=names))


def completed(state: dict, about: dict, path: Path, base: str | Path | None, **options) -> dict:
    """The whole state again. about: what `beside` says of the base. Raises InputError where it is another one."""
    try:
        names, place = about["names"], base or about["path"]
        known = load_base(place, **options)
        if weights_hash(known, ("",)) != about["hash"]:
            raise InputError(f"--base: {place} holds other weights")
    except InputError as error:
        raise InputError(f"{path} has what was trained beside base weights alone: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: base: {reason(error)}") from error
    return {name: tensor for name, tensor in known.state_dict().items() if name in names} | state


def check_image_size(model: FGCLIP, image_size: int) -> None:
    patch = model.vision_model.patch_size
    if image_size % patch or image_size > MAX_IMAGE_SIZE:
        expected = f"a multiple of the patch size, {patch}, of at most {MAX_IMAGE_SIZE}"
        raise InputError(f"--image-size {image_size}: expected {expected}")


def published_tokenizer(path: Path, vocab: str | Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer for published weights with a vocabulary of so many tokens."""
    if vocab is None:
        folder = path if path.is_dir() else path.parent
        vocab = next((folder / name for name in MERGE_FILES if (folder / name).is_file()), None)
    tokenizer = Tokenizer(vocab)
    if vocab == "bytes" and tokenizer.vocab_size <= vocab_size:
        return Tokenizer("bytes", vocab_size=vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{path} was trained on a vocabulary of {vocab_size} tokens, but there are {tokenizer.vocab_size} here "
            f"({tokenizer.description}); name the merges with --vocab"
        )
    return tokenizer
