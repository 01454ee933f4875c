"""Tensors and configs from files and folders. Nothing but a TorchScript archive that the caller trusts can run code."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

import trainkit.files as files
from trainkit.errors import InputError
from trainkit.files import inside, number, read_torch, regular_file, shown, state_dict_of

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Of open_clip's configs: what heads follow from, with open_clip's defaults, and what says nothing about the features.
OPEN_CLIP = dict(vision=dict(width=768, layers=12, head_width=64), text=dict(width=512, layers=12, heads=8))
OPEN_CLIP_FREE = ("patch_size", "image_size", "vocab_size", "context_length", "mlp_ratio", "patch_dropout", "pad_id")
OPEN_CLIP_FREE += ("output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "eos_id")
OPEN_CLIP_PLAIN = ("tok", "argmax", "default", "linear", "learnable")  # values of other keys that change nothing


def read_weights(path: Path, trust_torchscript: bool = False) -> dict[str, Tensor]:
    """The tensors of a directory or file. Raises InputError."""
    if not path.is_dir():
        return read_file(path, trust_torchscript)
    file = next((path / f for f in WEIGHT_FILES if (path / f).is_file()), None)
    if file is None:
        raise InputError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
    shards = [file]
    if file.suffix == ".json":
        shards = sorted({inside(path, name, str(file)) for name in read_json(file, "weight_map").values()})
    return {k: v for shard in shards for k, v in read_file(shard, trust_torchscript).items()}


def read_file(path: Path, trust_torchscript: bool) -> dict[str, Tensor]:
    regular_file(path, "a file or folder of weights")
    if is_safetensors(path):
        return read_safetensors(path)
    if is_torchscript(path):
        return read_torchscript(path, trust_torchscript)
    return state_dict_of(read_torch(path, "weights"), path)


def read_run(path: Path) -> dict | None:
    """A training run's checkpoint, None where the path is anything else that exists. Raises InputError."""
    if not path.is_file() or is_safetensors(path) or is_torchscript(path):
        return None
    content = read_torch(path, "a checkpoint or weights")
    return content if isinstance(content, dict) and "model_kwargs" in content else None


def is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # eight bytes of length, then JSON


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f'{path} needs the safetensors package: pip install "macl-fgclip[text]"') from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error


def is_torchscript(path: Path) -> bool:
    """Told by the names inside the archive; nothing of it is loaded."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is a damaged archive ({error})") from error


def read_torchscript(path: Path, trusted: bool) -> dict[str, Tensor]:
    if not trusted:
        raise InputError(
            f"{path} is a TorchScript archive, which can hold code; use --trust-torchscript if you trust its source"
        )
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise InputError(f"{path} is not a readable TorchScript archive ({type(error).__name__})") from error


def read_json(path: Path, *keys: str) -> dict:
    """The JSON object in the file, or what lies under its one key; InputError where a key is not there."""
    content = files.read_json(path, kind=dict)
    for key in keys:
        if not isinstance(content.get(key), dict):
            raise InputError(f"{path}: expected an object under the key {key}")
    return content[keys[0]] if len(keys) == 1 else content


def read_config(folder: Path, openai: bool) -> dict | None:
    """What the config.json or open_clip_config.json of a folder says, in the words of the former; None without either.

    openai: the weights have OpenAI's naming, so that the latter goes first, and a config.json may be somebody else's.
    """
    own, other = folder / "config.json", folder / "open_clip_config.json"
    if other.is_file() and (openai or not own.is_file()):
        return from_open_clip(read_json(other), str(other))
    if not own.is_file() or (openai and not {"text_config", "vision_config"} <= read_json(own).keys()):
        return None
    return read_json(own, "text_config", "vision_config")


def from_open_clip(config: dict, source: str) -> dict:
    """An open_clip_config.json in the words of Hugging Face's. Raises InputError on what is not built here."""
    model, found = config.get("model_cfg", config), {}
    for tower, defaults in OPEN_CLIP.items():
        given = model.get(f"{tower}_cfg") if isinstance(model, dict) else None
        if not isinstance(given, dict) or not isinstance(model.get("quick_gelu", False), bool):
            raise InputError(f"{source}: expected an object under the key {tower}_cfg, true or false under quick_gelu")
        for key, value in given.items():
            if value and key not in (*defaults, *OPEN_CLIP_FREE) and value not in OPEN_CLIP_PLAIN:
                raise InputError(f"{source}, {tower}_cfg: no model with {key} = {shown(value)} is built here")
        sizes = {key: number(given.get(key, value), f"{source}, {tower}_cfg, {key}", 1, 2**20, whole=True)
                 for key, value in defaults.items()}  # fmt: skip
        same = ("patch_size", "image_size", "vocab_size")
        found[f"{tower}_config"] = {key: given[key] for key in same if key in given} | dict(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes.get("heads") or sizes["width"] // sizes["head_width"],
            hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",
        )
    return found
