"""Published weights in, and out again: OpenAI's CLIP, open_clip, Hugging Face's CLIP and FG-CLIP.

Names and config become Hugging Face's, which are the model's. Loading is strict: every tensor of the source has a
place, and every parameter is filled from the source or reported as made from another one.
"""

import hashlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fgclip.lora import merged
from fgclip.model import FGCLIP
from fgclip.text import TextTower, stretch_positions, stretched_length
from fgclip.vision import VisionTower
from fgclip.weight_files import read_config, read_weights
from trainkit.errors import InputError
from trainkit.files import check_like, number, reason, shown, whole_file, write_json
from trainkit.load_report import LoadReport

IMAGE_PARTS = ("vision_model.", "visual_projection.", "roi_projection.")  # what features of images depend on
VISION, TEXT = "vision_model.embeddings.", "text_model.embeddings."
OPENAI_NAMES = (  # patterns and what they become, one after the other
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.conv1\.", VISION + "patch_embedding."),
    (r"^visual\.class_embedding$", VISION + "class_embedding"),
    (r"^visual\.positional_embedding$", VISION + "position_embedding.weight"),
    (r"^token_embedding\.", TEXT + "token_embedding."),
    (r"^positional_embedding$", TEXT + "position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights
HUGGING_FACE_NAMES = dict(  # of sizes, and ours
    hidden_size="width", num_hidden_layers="layers", num_attention_heads="heads", intermediate_size="mlp_width",
    hidden_act="activation", layer_norm_eps="eps", image_size="image_size", patch_size="patch_size",
    vocab_size="vocab_size",
)  # fmt: skip
# Width and layers of image and text tower: OpenAI's models, and open_clip's whose heads are 64 wide.
PUBLISHED = ((768, 12, 512, 12), (1024, 24, 768, 12), (896, 12, 640, 12), (512, 12, 512, 12), (512, 12, 384, 12))
PUBLISHED += ((384, 12, 384, 12), (384, 12, 256, 10))


def load_clip_weights(
    path_or_state_dict: str | Path | Mapping[str, Tensor], config: dict | None = None, *,
    trust_torchscript: bool = False, heads: Sequence[int] | None = None, activation: str | None = None,
) -> FGCLIP:  # fmt: skip
    """The model that the weights describe, in float32 on the CPU, with a `LoadReport` as its `load_report`.

    path_or_state_dict: a Hugging Face directory, a file (safetensors, torch.save, OpenAI's TorchScript), or a dict.
    config: the dict of a Hugging Face config.json; by default config.json or open_clip_config.json in the directory,
        or beside the file. Without one the end token is the largest id.
    trust_torchscript: read TorchScript archives too, whose code torch.jit.load may run.
    heads, activation: heads of image and text tower, "gelu" or "quick_gelu", where no config tells. By default they are
        guessed for published sizes: width / 64, quick_gelu.
    Raises InputError on a file that is none of these, and on a tensor that is missing, unknown or of another shape.
    """
    if isinstance(path_or_state_dict, Mapping):
        name, state = "the state dict", dict(path_or_state_dict)
    else:
        path = Path(path_or_state_dict)
        name, state = str(path), read_weights(path, trust_torchscript)
        config = read_config(path if path.is_dir() else path.parent) if config is None else config
    report = LoadReport(name)
    state = convert(state, report)
    report.loaded = list(state)
    arguments = infer_arguments(state, config or {}, heads, activation, report)
    report.made = make_missing(state)
    model = build(arguments, state, f"{name} with its config" if config else name)
    model.config["logit_scale"] = model.logit_scale.item()
    model.load_report = report
    return model


def convert(state: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, which pass unchanged; stacked queries, keys and values apart."""
    layout = "FG-CLIP" if "text_filip_projection.weight" in state else "Hugging Face CLIP"
    report.notes.append(f"layout: {'OpenAI CLIP' if 'visual.conv1.weight' in state else layout}")
    converted = {}
    for key, tensor in state.items():
        if key in OPENAI_FACTS or key.endswith("embeddings.position_ids"):
            report.skipped[key] = "no weights"
            continue
        if key in ("visual.proj", "text_projection"):  # they multiply from the right
            tensor = torch.atleast_2d(tensor).mT
        for pattern, replacement in OPENAI_NAMES:
            key = re.sub(pattern, replacement, key)
        parts = {key: tensor}
        if ".in_proj_" in key:
            thirds = torch.atleast_1d(tensor).chunk(3)
            parts = {key.replace(".in_proj_", f".{q}_proj."): third for q, third in zip("qkv", thirds, strict=False)}
        converted |= parts
    return converted


def infer_arguments(
    state: dict[str, Tensor], config: dict, heads: Sequence[int] | None, activation: str | None, report: LoadReport
) -> dict:
    """The keywords of FGCLIP: from the config, else from the tensors' shapes, else guessed, which the report says."""
    name = report.source
    try:
        width, _, patch, _ = state[VISION + "patch_embedding.weight"].shape
        cells = len(state[VISION + "position_embedding.weight"]) - 1
        vocab, text_width = state[TEXT + "token_embedding.weight"].shape
        vision = dict(width=width, patch_size=patch, image_size=round(cells**0.5) * patch)
        text = dict(width=text_width, vocab_size=vocab, context_length=len(state[TEXT + "position_embedding.weight"]))
        for tower, sizes in (("vision", vision), ("text", text)):
            prefix = f"{tower}_model.encoder.layers."
            sizes["layers"] = len({key.split(".")[3] for key in state if key.startswith(prefix)})
            sizes["mlp_width"] = len(state[prefix + "0.mlp.fc1.weight"])
        embed_dim = len(state["visual_projection.weight"])
    except (KeyError, TypeError, ValueError) as error:  # no such tensor, or one with other dimensions
        raise InputError(f"{name} is no CLIP with a vision transformer, or not whole ({reason(error)})") from error
    published = (width, vision["layers"], text_width, text["layers"]) in PUBLISHED
    guessed = []
    for tower, sizes, own_heads in zip(("vision", "text"), (vision, text), heads or (None, None), strict=True):
        section = config.get(f"{tower}_config") or {}
        sizes |= {ours: section[theirs] for theirs, ours in HUGGING_FACE_NAMES.items() if theirs in section}
        guesses = dict(heads=sizes["width"] // 64 if published else None, activation="quick_gelu")
        for key, flag in (("heads", own_heads), ("activation", activation)):
            if flag is not None and sizes.setdefault(key, flag) != flag:
                raise InputError(f"--{key}: the config of {name} says {shown(sizes[key])} for its {tower} tower")
            if key not in sizes and not section:
                sizes[key] = guesses[key]
                guessed.append(f"{tower} {key} {sizes[key]} (--{key})")
        if sizes.get("heads", 1) is None:
            expected = "config.json or open_clip_config.json beside it, or --heads VISION TEXT"
            raise InputError(f"{name}: the number of attention heads is not known; expected {expected}")
    end = (config.get("text_config") or {}).get("eos_token_id")
    text["eos_id"] = None if end == 2 else end  # 2: files of before the id was corrected
    if guessed:
        report.notes.append(f"guessed: {', '.join(guessed)}")
    parts = dict(logit_bias=0.0 if "logit_bias" in state else None, roi_projection="roi_projection.weight" in state)
    return dict(vision=vision, text=text, embed_dim=embed_dim, **parts)


def make_missing(state: dict[str, Tensor]) -> dict[str, str]:
    """Adds to `state` what plain CLIP lacks, each a copy of another tensor; returns name -> origin."""
    table = TEXT + "position_embedding.weight"
    tables = [f"{TEXT}position_embedding_{kind}.weight" for kind in ("res", "ori")]
    origins = {"logit_scale_finegraind": "logit_scale", "logit_scale_hardneg": "logit_scale"}
    if stretched_length(len(state[table])) is not None:
        origins |= {"text_filip_projection.weight": "text_projection.weight", **dict.fromkeys(tables, table)}
    made = {}
    for target, origin in origins.items():
        if target not in state and origin in state:
            state[target] = stretch_positions(state[origin].float()) if target in tables else state[origin]
            made[target] = f"{'stretched ' if target in tables else ''}{origin}"
    return made


def build(arguments: Mapping, state: Mapping[str, Tensor], source: str) -> FGCLIP:
    """FGCLIP(**arguments) with copies of the tensors, adapters `merged`, in float32 on the CPU.

    Raises InputError where they don't fit.
    """
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        state, arguments = merged(state), dict(arguments)
        for tower in ("vision", "text"):
            arguments[tower] = sizes = dict(arguments.get(tower) or {})
            for key, value in sizes.items():
                if key == "eps":
                    sizes[key] = number(value, f"{source}: {tower}, eps", 0, 1)
                elif key != "activation" and (key, value) != ("eos_id", None):
                    most = len(state) if key == "layers" else 2**31
                    sizes[key] = number(value, f"{source}: {tower}, {key}", int(key != "eos_id"), most, whole=True)
        with torch.device("meta"):  # in case the file claims a large one
            model = FGCLIP(**arguments)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} describes no model that can be built: {reason(error)}") from error
    check_like(state, model.state_dict(), source)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model


def hugging_face_config(model: FGCLIP) -> dict:
    """The config.json of a model, from which `load_clip_weights` builds the same."""
    config = dict(architectures=["FGCLIPModel"], model_type="clip", projection_dim=model.config["embed_dim"])
    for name, tower in (("vision", VisionTower), ("text", TextTower)):
        sizes = {key: keyword.default for key, keyword in inspect.signature(tower).parameters.items()}
        sizes |= model.config[name]
        config[f"{name}_config"] = {theirs: sizes[ours] for theirs, ours in HUGGING_FACE_NAMES.items() if ours in sizes}
    text, eos_id = config["text_config"], model.text_model.eos_id
    text |= dict(max_position_embeddings=model.text_model.context_length, eos_token_id=2 if eos_id is None else eos_id)
    return config


def save_clip_weights(model: FGCLIP, directory: str | Path) -> None:
    """Writes model.safetensors, adapters merged, and config.json in the FG-CLIP layout. Needs safetensors."""
    from safetensors.torch import save

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in merged(model.state_dict()).items()}
    with whole_file(directory / "model.safetensors") as file:
        file.write(save(state, metadata={"format": "pt"}))
    write_json(directory / "config.json", hugging_face_config(model), indent=1)


def weights_hash(model: FGCLIP, parts: Collection[str] = IMAGE_PARTS) -> str:
    """A hash of the weights whose names begin so, and of what else of the image tower is no weight."""
    tower, digest = model.vision_model, hashlib.sha256()
    block = tower.encoder.layers[0]
    digest.update(f"{block.self_attn.heads} {block.mlp.activation.__name__} {tower.post_layernorm.eps}".encode())
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(tuple(parts)):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
