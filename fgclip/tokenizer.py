"""CLIP's byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021, section 2.4), with or without merges."""

import gzip
import html
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from trainkit.errors import InputError
from trainkit.files import parse_json, reason, regular_file, shown

try:
    import ftfy
except ImportError:
    ftfy = None
try:
    import regex
except ImportError:
    regex = None

PUBLISHED_MERGES = 49152 - 256 - 2  # CLIP uses the first 48894 lines of a longer file
NO_MERGES = "#version: 0.2"  # a file of merges with this line alone: one token per byte
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_MERGES = 2**26  # bytes of a file of merges, unpacked; the published ones have 3 MB
WORD_CACHE = 65536


@cache
def byte_symbols() -> dict[int, str]:
    """The character that stands for each byte, in the vocabulary's order: itself if printable, else chr(256), ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def word_pattern():
    """Splits clean text into words: specials, contractions, runs of letters, single digits, runs of anything else."""
    letter, number, other, library = r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", regex
    if regex is None:  # the same classes by the standard library's \w, twice as slow
        numerals = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
        letter, number, other, library = rf"[^\W\d_{numerals}]", rf"[\d{numerals}]", r"(?:_|[^\s\w])", re
    special = f"{re.escape(START)}|{re.escape(END)}"
    return library.compile(rf"{special}|'s|'t|'re|'ve|'m|'ll|'d|{letter}+|{number}|{other}+", re.IGNORECASE)


def clean(text: str) -> str:
    """Repairs mojibake (needs ftfy), unescapes HTML twice, joins whitespace, lower-cases."""
    text = re.sub("\ufeff|[0-9]{4000,}", "", text)  # byte-order marks, and digits that int() refuses in &#...;
    if ftfy is not None:
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def installed_merges() -> Path | None:
    """The merges file inside an installed CLIP package, which is not imported."""
    specs = [spec for spec in map(find_spec, ("clip", "open_clip")) if spec]
    folders = (folder for spec in specs for folder in spec.submodule_search_locations or [])
    paths = (Path(folder) / "bpe_simple_vocab_16e6.txt.gz" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges in a bpe_simple_vocab_16e6.txt.gz, a merges.txt or a Hugging Face tokenizer.json."""
    path = regular_file(path, "bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_MERGES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} holds no BPE merges ({reason(error)})") from error
    if len(content) > MAX_MERGES:
        raise InputError(f"{path} holds more than {MAX_MERGES} bytes, too many for BPE merges")
    if path.suffix == ".json":
        merges = parse_json(text, str(path))
        for key in ("model", "merges"):
            merges = merges.get(key) if isinstance(merges, dict) else None
    else:
        merges = [line for line in text.split("\n")[1 : PUBLISHED_MERGES + 1] if line.strip()]  # after the version
    if not merges and text.strip() != NO_MERGES:
        raise InputError(f"{path} holds no BPE merges")
    return checked_merges(merges, str(path))


def checked_merges(merges, source: str) -> list[tuple[str, str]]:
    """Pairs of symbols from a list of pairs or of lines with one pair each."""
    if not isinstance(merges, list | tuple):
        raise InputError(f"{source}, merges: expected a list of pairs, got {shown(merges)}")
    pairs = [pair.split() if isinstance(pair, str) else pair for pair in merges]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            raise InputError(f"{source}, merges: expected two symbols, got {shown(pair)}")
    return [tuple(pair) for pair in pairs]


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of every word of the texts, the most frequent pair first (Sennrich et al. 2016)."""
    counts = Counter(word for text in texts for word in word_pattern().findall(clean(text)))
    words = {word: word_symbols(word) for word in counts}
    merges = []
    while True:
        pairs = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = {word: merge_pair(symbols, merges[-1]) for word, symbols in words.items()}


class Tokenizer:
    """Text to token ids.

    vocab: path of a merges file (`read_merges`), the merges themselves, or "bytes" for none: 514 ids, one per byte.
        None takes the merges of an installed CLIP package (clip or open_clip), else "bytes".
    vocab_size: number of ids, by default as many as needed. Start and end are the last two.

    `description` says what is in use, `truncated` counts the texts cut so far.
    """

    def __init__(self, vocab: str | Path | Sequence[tuple[str, str]] | None = None, *, vocab_size: int | None = None):
        if vocab is None:
            vocab = installed_merges() or "bytes"
        if isinstance(vocab, str | Path):
            merges, origin = [] if vocab == "bytes" else read_merges(vocab), f"of {vocab}"
        else:
            merges, origin = [tuple(pair) for pair in vocab], "learned from the data"
        self.merges = merges
        symbols = list(byte_symbols().values())
        symbols = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.vocab_size = len(symbols) + 2 if vocab_size is None else vocab_size
        self.encoder = {symbol: i for i, symbol in enumerate(symbols)}
        self.encoder |= {START: self.vocab_size - 2, END: self.vocab_size - 1}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.bos_id, self.eos_id = self.encoder[START], self.encoder[END]
        self.words: dict[str, list[int]] = {}  # a cache
        self.truncated = 0
        self.description = f"CLIP BPE with {len(merges)} merges {origin}" if merges else "CLIP BPE on bytes, no merges"
        if ftfy is None:
            self.description += "; ftfy is not installed (extra: text), so damaged Unicode is not repaired"

    def __call__(self, texts: str | Sequence[str], context_length: int = 77) -> Tensor:
        """Ids (N, context_length) int64 of N texts: start, words, end, zeros. Words that do not fit are cut off."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > context_length - 2:
                ids = ids[: context_length - 2]
                self.truncated += 1
            row[: len(ids) + 2] = torch.tensor([self.bos_id, *ids, self.eos_id])
        return tokens  # (N, L)

    def encode(self, text: str) -> list[int]:
        """Ids of one text without start, end and limit."""
        return [i for word in word_pattern().findall(clean(text)) for i in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word: its bytes, the last one marked, then the pair of lowest rank merged until none is left."""
        if word in self.words:
            return self.words[word]
        symbols = [word] if word in (START, END) else word_symbols(word)
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda p: self.ranks.get(p, sys.maxsize))
            if pair not in self.ranks:
                break
            symbols = merge_pair(symbols, pair)
        ids = [self.encoder[s] for s in symbols]
        if len(self.words) < WORD_CACHE:
            self.words[word] = ids
        return ids


def word_symbols(word: str) -> list[str]:
    """One symbol per byte, the last one marked as the end of its word."""
    symbols = [byte_symbols()[b] for b in word.encode("utf-8", errors="surrogatepass")]
    return [*symbols[:-1], symbols[-1] + "</w>"]


def merge_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of the pair, from left to right."""
    merged, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged
