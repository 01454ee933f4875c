"""A model and the tokenizer that belongs to it, from a training run's checkpoint or from published weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fgclip.errors import InputError
from fgclip.model import FGCLIP
from fgclip.tokenizer import Tokenizer
from fgclip.weight_files import read_run
from fgclip.weights import load_clip_weights

SCRIPT = "fgclip"  # what a run's checkpoint calls the script that wrote it
MERGE_FILES = ("tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")


def load_model(
    path: str | Path,
    vocab: str | Path | None = None,
    *,
    weights: str = "ema",
    trust_torchscript: bool = False,
) -> tuple[FGCLIP, Tokenizer]:
    """The model, in evaluation mode on the CPU, and its tokenizer.

    path: a checkpoint of train_fgclip.py, which brings its tokenizer along, or whatever `load_clip_weights` reads.
    vocab: for published weights, the merges as in `Tokenizer`; by default a file of them beside the weights, else those
        of an installed CLIP package. "bytes" goes without any, with weights that were trained on merges to no good.
    weights: of a run, "ema" takes the averaged weights where there are any, "raw" the trained ones.
    trust_torchscript: read TorchScript archives too, whose code torch.jit.load may run.
    Raises InputError on files of another kind, and where tokenizer and weights do not have the same vocabulary.
    """
    path = Path(path)
    run = read_run(path)
    if run is not None:
        if vocab is not None:
            raise InputError(f"--vocab {vocab}: the run's checkpoint {path} brings its own tokenizer")
        model, tokenizer = restore(run, path, weights)
    else:
        model = load_clip_weights(path, trust_torchscript=trust_torchscript)
        tokenizer = published_tokenizer(path, vocab, model.text_model.vocab_size)
    return model.eval(), tokenizer


def restore(run: Mapping, path: Path, weights: str = "ema") -> tuple[FGCLIP, Tokenizer]:
    """The model and tokenizer of a run's checkpoint that is already read.

    Keys: script; model_kwargs, the keywords of FGCLIP; model and ema (None without averaging), state dicts; merges, the
    tokenizer's, a list of pairs.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights {weights!r} is neither ema nor raw")
    if run.get("script") != SCRIPT:
        raise InputError(f"{path} is a checkpoint of train_{run.get('script')}.py; expected one of train_fgclip.py")
    if lacking := [key for key in ("model", "merges") if key not in run]:
        raise InputError(f"{path} lacks {', '.join(lacking)}, which a checkpoint of train_fgclip.py holds")
    state: dict[str, Tensor] = run["ema"] if weights == "ema" and run.get("ema") is not None else run["model"]
    try:
        model = FGCLIP(**run["model_kwargs"])
        model.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise InputError(f"{path} was written by another version of the model: {first}") from error
    return model, Tokenizer(run["merges"], vocab_size=model.text_model.vocab_size)


def published_tokenizer(path: Path, vocab: str | Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer for published weights, whose vocabulary has so many tokens. Raises InputError."""
    if vocab == "bytes":
        if vocab_size < Tokenizer("bytes").vocab_size:
            raise InputError(f"--vocab bytes: {path} knows only {vocab_size} tokens, fewer than there are bytes")
        return Tokenizer("bytes", vocab_size=vocab_size)
    if vocab is None:
        folder = path if path.is_dir() else path.parent
        vocab = next((folder / name for name in MERGE_FILES if (folder / name).is_file()), None)
    tokenizer = Tokenizer(vocab)
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{path} was trained on a vocabulary of {vocab_size} tokens, but there are {tokenizer.vocab_size} here "
            f"({tokenizer.description}); name the right file of merges with --vocab"
        )
    return tokenizer
