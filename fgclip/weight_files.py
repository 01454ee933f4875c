"""Tensors from files and folders. Nothing but a TorchScript archive that the caller trusts can run code."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

import training.files as files
from training.errors import InputError
from training.files import read_torch, state_dict_of

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_weights(path: Path, trust_torchscript: bool = False) -> dict[str, Tensor]:
    """The tensors of a directory or file. Raises InputError."""
    if path.is_dir():
        file = next((path / f for f in WEIGHT_FILES if (path / f).is_file()), None)
        if file is None:
            raise InputError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
        if file.suffix != ".json":
            return read_weights(file, trust_torchscript)
        shards = sorted(set(read_json(file, "weight_map").values()))
        if any(not isinstance(s, str) or Path(s).name != s for s in shards):
            raise InputError(f"{file}: expected the names of files in the same folder under weight_map")
        return {k: v for shard in shards for k, v in read_weights(path / shard, trust_torchscript).items()}
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder of weights")
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


def read_config(path: Path) -> dict | None:
    """A Hugging Face config.json of a CLIP model, None where there is no such file."""
    return read_json(path, "text_config", "vision_config") if path.is_file() else None
