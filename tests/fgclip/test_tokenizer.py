"""The byte-pair encoding on bytes, on merges of its own, and against the published one where its merges are found."""

import gzip
import json
import pickle
import random
import unicodedata

import pytest
import torch

from fgclip import Tokenizer, tokenizer
from trainkit.errors import InputError

ARTICLE_MERGES = "#version: 0.2\nt h\nth e</w>\nr e\nre d</w>\na a\n"


@pytest.fixture
def merges(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text(ARTICLE_MERGES)
    return path


def test_bytes_alone():
    bytes_only = Tokenizer("bytes")
    assert (bytes_only.vocab_size, bytes_only.bos_id, bytes_only.eos_id) == (514, 512, 513)
    tokens = bytes_only(["ab c", ""], 8)
    assert tokens.dtype == torch.int64
    a = ord("a") - ord("!")
    assert tokens.tolist() == [[512, a, a + 1 + 256, a + 2 + 256, 513, 0, 0, 0], [512, 513, 0, 0, 0, 0, 0, 0]]
    assert "bytes" in bytes_only.description


def test_every_byte_has_a_token():
    symbols = tokenizer.byte_symbols()
    assert len(symbols) == len(set(symbols.values())) == 256
    assert all(len(s) == 1 and not s.isspace() for s in symbols.values())
    assert [symbols[b] for b in b"A~"] == ["A", "~"] and symbols[0] == chr(256)
    for text in ("naïve 東京", "\U0001f600", "\ud800"):
        assert all(0 <= i < 512 for i in Tokenizer("bytes").encode(text))


def test_merges_by_rank(merges):
    own = Tokenizer(merges)
    assert own.vocab_size == 514 + 5
    the, red, aa = 512 + 1, 512 + 3, 512 + 4
    assert own.encode("the red") == [the, red]
    a, h = ord("a") - ord("!"), ord("h") - ord("!")
    assert own.encode("aaaaa") == [aa, aa, a + 256]
    assert own.encode("th") == [ord("t") - ord("!"), h + 256]  # "t h" is no merge at the end of a word
    assert own("the red", 4).tolist() == [[own.bos_id, the, red, own.eos_id]]
    assert pickle.loads(pickle.dumps(own))("the red", 9).equal(own("the red", 9))  # as workers get it


def test_every_format_of_merges_is_the_same(tmp_path, merges):
    lines = ARTICLE_MERGES.strip().split("\n")[1:]
    packed = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    packed.write_bytes(gzip.compress(ARTICLE_MERGES.encode()))
    as_text, as_pairs = tmp_path / "tokenizer.json", tmp_path / "pairs.json"
    as_text.write_text(json.dumps(dict(model=dict(merges=lines))))
    as_pairs.write_text(json.dumps(dict(model=dict(merges=[line.split() for line in lines]))))
    for path in (packed, as_text, as_pairs):
        assert Tokenizer(path).encoder == Tokenizer(merges).encoder, path
    for path in (merges, as_text, as_pairs):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark, as Windows' editors write it
        assert Tokenizer(path).encoder == Tokenizer(packed).encoder, path


def test_longer_merge_files_are_cut_where_clip_cuts_them(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("version\n" + "".join(f"{i} x\n" for i in range(50000)))
    assert len(tokenizer.read_merges(path)) == 48894


def test_other_files_are_refused(tmp_path):
    (tmp_path / "three.txt").write_text("version\na b c\n")
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"version\n" + b"a b\n" * 2**24, 1, mtime=0))
    for name in ("three.txt", "bomb.txt.gz", "absent"):
        with pytest.raises(InputError, match=name):
            Tokenizer(tmp_path / name)


def test_cleaning(monkeypatch):
    """With ftfy and without it, which is said."""
    assert ("ftfy" in Tokenizer("bytes").description) == (tokenizer.ftfy is None)
    if tokenizer.ftfy is not None:
        assert tokenizer.clean("cafÃ©") == "café"
    monkeypatch.setattr(tokenizer, "ftfy", None)  # it unescapes once itself
    assert "ftfy is not installed" in Tokenizer("bytes").description
    assert tokenizer.clean("  A\t\nB&amp;lt; ") == "a b<"
    assert tokenizer.clean("\ufeffa cat \ufeff ") == "a cat"
    assert tokenizer.clean(f"a&#{'9' * 5000}; &amp;#{'9' * 5000}; b") == "a&#; &#; b"  # more digits than int() takes


def test_words():
    def words(text):
        return tokenizer.word_pattern().findall(text)

    assert words("don't we've 12a_b!? x") == ["don", "'t", "we", "'ve", "1", "2", "a", "_", "b", "!?", "x"]
    assert words("<|startoftext|>x") == ["<|startoftext|>", "x"]
    assert words("½ⅻ²x") == ["½", "ⅻ", "²", "x"]


@pytest.mark.parametrize("installed", [True, False])
def test_words_are_those_of_the_published_pattern(installed, monkeypatch):
    """Without regex up to letters younger than Python's Unicode table, and one mark that regex folds to a letter."""
    regex = pytest.importorskip("regex")
    monkeypatch.setattr(tokenizer, "regex", regex if installed else None)
    pattern = tokenizer.word_pattern.__wrapped__()
    published = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    random.seed(0)
    pool = [chr(c) for c in [*range(32, 0x2000), *range(0x3000, 0x3400)] if unicodedata.category(chr(c)) != "Cn"]
    pool = [c for c in pool if c != "\u0345"] + list("ab 's't12_-") * 300
    for text in ("".join(random.choices(pool, k=40)) for _ in range(300)):
        assert pattern.findall(text) == regex.findall(published, text, regex.IGNORECASE)


def test_learned_merges_make_words_of_texts():
    texts = ["a red striped circle", "a green ring", "Red circles, red!"]
    merges = tokenizer.learn_merges(texts)
    assert merges == tokenizer.learn_merges(texts)
    own = Tokenizer(merges)
    assert [len(own.encode(text)) for text in texts] == [4, 3, 5]
    assert "learned" in own.description and own.merges == merges
    assert len(own.encode("greed")) > 1
    assert Tokenizer([list(pair) for pair in merges]).encoder == own.encoder


def test_long_texts_keep_their_end_and_are_counted():
    own = Tokenizer("bytes")
    tokens = own(["abcdef", "abcd", "abcdefgh"], 6)
    assert tokens[:, -1].tolist() == [513] * 3 and tokens[0, :5].equal(tokens[2, :5])
    assert own.truncated == 2


@pytest.mark.parametrize("length", [77, 248])
def test_golden_ids(golden, length):
    if tokenizer.installed_merges() is None:
        pytest.skip("no CLIP package with merges is installed")
    g = golden("tokenize")
    found = Tokenizer()([str(t) for t in g.arrays["texts"]], length)
    assert found.equal(g[f"openai_{length}_pad0"].long())
    ends = (found == 49407).cumsum(1) > 0
    assert found.where(~ends, 49407).equal(g[f"hf_{length}_padeos"].long())
