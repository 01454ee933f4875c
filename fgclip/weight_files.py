"""Weights and their configs from files and folders."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from trainkit.errors import InputError
from trainkit.files import inside, number, read_json, read_torch, regular_file, shown, state_dict_of

EXPECTED = "a file or folder of weights"
WEIGHT_FILES = "model.safetensors pytorch_model.bin open_clip_model.safetensors open_clip_pytorch_model.bin".split()
# open_clip's configs: sizes with their defaults; keys without effect on the features; values without effect elsewhere.
OPEN_CLIP = dict(vision=dict(width=768, layers=12, head_width=64), text=dict(width=512, layers=12, heads=8))
OPEN_CLIP_FREE = ("patch_size", "image_size", "vocab_size", "context_length", "mlp_ratio", "patch_dropout", "pad_id")
OPEN_CLIP_FREE += ("output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "eos_id")
OPEN_CLIP_PLAIN = ("tok", "argmax", "default", "linear", "learnable")


def read_weights(path: Path, trust_torchscript: bool = False) -> dict[str, Tensor]:
    """The tensors in a file, or in a folder with one of WEIGHT_FILES or its .index.json."""
    if not path.is_dir():
        return read_file(path, trust_torchscript)
    names = [name + end for name in WEIGHT_FILES for end in ("", ".index.json")]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
    shards = [file]
    if file.suffix == ".json":
        shards = sorted({inside(path, name, str(file)) for name in read_object(file, "weight_map").values()})
    return {name: tensor for shard in shards for name, tensor in read_file(shard, trust_torchscript).items()}


def read_file(path: Path, trust_torchscript: bool) -> dict[str, Tensor]:
    """The tensors in a safetensors file, told by its suffix, a TorchScript archive, or what torch.save wrote."""
    if regular_file(path, EXPECTED).suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise InputError(f'{path} needs the safetensors package: pip install "macl-fgclip[text]"') from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file ({error})") from error
    if not is_torchscript(path):
        return state_dict_of(read_torch(path, EXPECTED), path)
    if not trust_torchscript:
        raise InputError(f"{path} is a TorchScript archive, which can hold code: read only with --trust-torchscript")
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise InputError(f"{path} is not a readable TorchScript archive ({type(error).__name__})") from error


def read_run(path: Path) -> dict | None:
    """A training run's checkpoint; None for weights of other kinds."""
    if path.is_dir() or regular_file(path, EXPECTED).suffix == ".safetensors" or is_torchscript(path):
        return None
    content = read_torch(path, EXPECTED)
    return content if isinstance(content, dict) and "model_kwargs" in content else None


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; nothing of it is loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # no archive, or a damaged one, which `read_torch` refuses


def read_object(path: Path, key: str) -> dict:
    """The JSON object under a key of the object in a file."""
    content = read_json(path, kind=dict).get(key)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object under the key {key}")
    return content


def read_config(folder: Path) -> dict:
    """text_config and vision_config of a folder's config.json or open_clip_config.json; {} without either."""
    file, sections = folder / "config.json", ("text_config", "vision_config")
    if file.is_file() and {*sections} <= read_json(file, kind=dict).keys():  # otherwise it is somebody else's
        return {section: read_object(file, section) for section in sections}
    file = folder / "open_clip_config.json"
    return from_open_clip(read_json(file, kind=dict), str(file)) if file.is_file() else {}


def from_open_clip(config: dict, source: str) -> dict:
    """An open_clip_config.json in the words of Hugging Face's."""
    model, converted = config.get("model_cfg", config), {}
    for tower, defaults in OPEN_CLIP.items():
        given = model.get(f"{tower}_cfg") if isinstance(model, dict) else None
        if not isinstance(given, dict):
            raise InputError(f"{source}: expected an object under the key {tower}_cfg")
        for key, value in given.items():
            if value and key not in (*defaults, *OPEN_CLIP_FREE) and value not in OPEN_CLIP_PLAIN:
                raise InputError(f"{source}, {tower}_cfg: no model with {key} = {shown(value)} is built here")
        sizes = {}
        for key, default in defaults.items():
            sizes[key] = number(given.get(key, default), f"{source}, {tower}_cfg, {key}", 1, 2**20, whole=True)
        heads = sizes.get("heads") or sizes["width"] // sizes["head_width"]
        sizes = dict(hidden_size=sizes["width"], num_hidden_layers=sizes["layers"], num_attention_heads=heads)
        converted[f"{tower}_config"] = sizes | dict(hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu")
    return converted
