"""Damaged files: whatever stands in them is read sanely, or refused in one line that names the file."""

import copy
import io
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from trainkit.errors import InputError

VALUES = [None, True, 0, -1, 1.5, 10**9, 10**30, 1e300, float("nan"), float("-inf"), "", "..", "/etc/passwd", "\ud800"]
VALUES += ["a\nb", "x" * 70000, "9" * 5000, [], {}, [[]], {"a": 1}, [None], [1, 2, 3, 4], "../b", 2, 32, "1"]
TENSORS = [torch.zeros(1).expand(10**9), torch.ones(2), torch.full((8,), float("nan"))]
SPOILT = [b"", b"\0", b"[" * 10**5, b"{}", b"[]", b"\xff\xfe[", b'{"a":' * 10**5, b"\n" * 70000 + b"[", b"9" * 5000]
SPOILT += [b"<a>" * 10**5, b"% bbGt version=3\nperson 1", b"1,2"]


def places(value):
    """(container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutant(rng: random.Random, value, values: list):
    """A copy in which one or two things are gone or of another kind."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(places(value)))
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice([*values, [container[key]], key]))  # else values hold each other
        if not any(places(value)):
            break
    return value


def torch_file(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def xml(name: str, value) -> str:
    """Nested dicts and lists as elements; a list repeats its name."""
    if isinstance(value, list):
        return "".join(xml(name, item) for item in value)
    inner = "".join(xml(str(k), v) for k, v in value.items()) if isinstance(value, dict) else str(value)
    return f"<{name}>{inner}</{name}>"


ENCODERS = {
    ".json": lambda value: json.dumps(value).encode(),
    ".jsonl": lambda value: "\n".join(map(json.dumps, value)).encode(),
    ".pt": torch_file,
    ".xml": lambda value: xml("annotation", value).encode("utf-8", "surrogatepass"),
    ".txt": lambda value: "\n".join(
        " ".join(map(str, line)) if isinstance(line, list) else str(line) for line in value
    ).encode("utf-8", "surrogatepass"),
}
ENCODERS[".yaml"] = ENCODERS[".txt"]


def mutants(name: str, sound, count: int):
    """`count` damaged files as (number, bytes). sound: what the file holds, or its bytes."""
    if isinstance(sound, bytes):
        yield from ((i, damaged(random.Random(f"{name} {i}"), sound)) for i in range(count))
        return
    encode = ENCODERS[Path(name).suffix]
    values = [*VALUES, *TENSORS] if name.endswith(".pt") else VALUES
    for i in range(count):
        rng = random.Random(f"{name} {i}")
        content = SPOILT[i] if i < len(SPOILT) else encode(mutant(rng, sound, values))
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content) + 1)] + rng.randbytes(rng.choice((0, 9)))
        yield i, content


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes of which a few are others, some are missing, or which are cut short."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    start = rng.randrange(len(content))
    kind = rng.random()
    return bytes(content[:start] if kind < 0.3 else content[:start] + content[start + 9 :] if kind < 0.4 else content)


def hunt(path: Path, sound, use: Callable[[Path], object], count: int) -> None:
    """Every mutant of a file is used without a word, or refused in one line that names its place."""
    path.write_bytes(sound if isinstance(sound, bytes) else ENCODERS[path.suffix](sound))
    use(path)
    outcomes = set()
    for i, content in mutants(path.name, sound, count):
        path.write_bytes(content)
        began = time.monotonic()
        with warnings.catch_warnings(action="error"):
            try:
                use(path)
                outcomes.add("read")
            except InputError as error:
                message = str(error)
                assert message.isprintable() and len(message) <= 500 and str(path.parent) in message, (i, message)
                outcomes.add("refused")
        assert time.monotonic() - began < 60, i  # far below on a machine that does nothing else
    path.unlink()
    assert "refused" in outcomes
