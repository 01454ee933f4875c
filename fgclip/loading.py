"""A model and the tokenizer that belongs to it, from a training run's checkpoint or from published weights."""

from collections.abc import Sequence
from pathlib import Path

from fgclip.model import FGCLIP
from fgclip.tokenizer import Tokenizer, checked_merges
from fgclip.weight_files import read_run
from fgclip.weights import build, load_clip_weights
from trainkit.errors import InputError
from trainkit.files import state_dict_of
from trainkit.load_report import LoadReport

MAX_IMAGE_SIZE = 4096  # pixels, of the square that a model is shown
MERGE_FILES = ("tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")


def load_model(
    path: str | Path, vocab: str | Path | None = None, *, weights: str = "ema", trust_torchscript: bool = False,
    heads: Sequence[int] | None = None, activation: str | None = None,
) -> tuple[FGCLIP, Tokenizer]:  # fmt: skip
    """The model, in evaluation mode on the CPU, and its tokenizer.

    path: a checkpoint of train_fgclip.py or train_video.py, which holds its tokenizer, or whatever `load_clip_weights`
        reads.
    vocab: for published weights, the merges as in `Tokenizer`; by default a file of them beside the weights, else those
        of an installed CLIP package.
    weights: for a run, "ema" takes the averaged weights where there are any, "raw" the trained ones.
    trust_torchscript, heads, activation: for published weights, as in `load_clip_weights`.
    Raises InputError on files of another kind, and where tokenizer and weights differ in their vocabulary.
    """
    path = Path(path)
    run = read_run(path)
    if run is None:
        model = load_clip_weights(path, trust_torchscript=trust_torchscript, heads=heads, activation=activation)
        return model.eval(), published_tokenizer(path, vocab, model.text_model.vocab_size)
    for flag, value in (("--vocab", vocab), ("--heads", heads), ("--activation", activation)):
        if value is not None:
            raise InputError(f"{flag}: the run's checkpoint {path} brings its own tokenizer, heads and activation")
    script = run.get("script")
    if script not in ("fgclip", "video"):
        raise InputError(f"{path} is a checkpoint of train_{script}.py; expected one of train_fgclip.py")
    if lacking := [key for key in ("model", "merges") if key not in run]:
        raise InputError(f"{path} lacks {', '.join(lacking)}, which a checkpoint of train_{script}.py holds")
    state = state_dict_of(run["ema"] if weights == "ema" and run.get("ema") is not None else run["model"], path)
    if script == "video":  # the towers beside the head
        state = {name.removeprefix("fgclip."): x for name, x in state.items() if name.startswith("fgclip.")}
    model = build(run["model_kwargs"], state, f"{path} (damaged, or written by another version of the model)")
    model.load_report = LoadReport(str(path), list(state))
    merges, vocab_size = checked_merges(run["merges"], str(path)), model.text_model.vocab_size
    if Tokenizer(merges).vocab_size > vocab_size:
        raise InputError(f"{path}: more merges than the model's {vocab_size} tokens")
    return model.eval(), Tokenizer(merges, vocab_size=vocab_size)


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
