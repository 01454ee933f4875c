"""Published weights in, and out again: OpenAI's CLIP, Hugging Face's CLIP and FG-CLIP.

Strict: every tensor of the source has a place, every parameter of the model is filled from the source or named in the
report as made from another one. Hugging Face's names are the model's own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fgclip.model import FGCLIP
from fgclip.text import stretch_positions
from fgclip.transformer import ACTIVATIONS
from fgclip.weight_files import read_config, read_weights
from trainkit.errors import InputError
from trainkit.files import number, reason, shown, whole_file, write_json

VISION, TEXT = "vision_model.embeddings.", "text_model.embeddings."
OPENAI_TENSORS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": VISION + "class_embedding",
    "visual.conv1.weight": VISION + "patch_embedding.weight",
    "visual.positional_embedding": VISION + "position_embedding.weight",
    "token_embedding.weight": TEXT + "token_embedding.weight",
    "positional_embedding": TEXT + "position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
OPENAI_TRANSPOSED = ("visual.proj", "text_projection")  # they multiply from the right
OPENAI_MODULES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
OPENAI_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights
# Width and layers of image and text tower: OpenAI's models, and open_clip's whose heads are 64 wide.
PUBLISHED = ((768, 12, 512, 12), (1024, 24, 768, 12), (896, 12, 640, 12), (512, 12, 512, 12), (512, 12, 384, 12))
PUBLISHED += ((384, 12, 384, 12), (384, 12, 256, 10))
HUGGING_FACE_HEADS = dict(vision=12, text=8)  # of a config that does not say


@dataclass(frozen=True)
class LoadReport:
    """What a load did. loaded: parameters taken from the source; made: parameters new here, with what they were made
    from; ignored: source tensors that are no weights; guessed: what neither tensors nor a config told."""

    source: str
    layout: str
    loaded: tuple[str, ...]
    made: dict[str, str]
    ignored: tuple[str, ...]
    guessed: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = "; ".join(f"{name} = {origin}" for name, origin in self.made.items())
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        guessed = f"; guessed: {', '.join(self.guessed)}" if self.guessed else ""
        loaded = f"{len(self.loaded)} tensors loaded, newly made: {made or 'none'}"
        return f"{self.source}: {self.layout}, {loaded}{ignored}{guessed}"


def load_clip_weights(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: dict | None = None,
    *,
    roi_projection: bool = False,
    trust_torchscript: bool = False,
    heads: Sequence[int] | None = None,
    activation: str | None = None,
) -> FGCLIP:
    """The model that the weights describe, in float32 on the CPU, with a `LoadReport` as its `load_report`.

    path_or_state_dict: a Hugging Face directory, a file (safetensors, torch.save, OpenAI's TorchScript), or a dict.
    config: the dict of a Hugging Face config.json; by default read from config.json or open_clip_config.json in the
        directory, or beside the file. Without one the end token is the largest id.
    heads, activation: attention heads of image and text tower, "gelu" or "quick_gelu", where no config tells. Without
        them they are guessed of the published sizes that have heads of 64: width / 64, quick_gelu.
    roi_projection: give regions a projection of their own, a copy of the image's where the source has none.
    trust_torchscript: read TorchScript archives too, whose code torch.jit.load may run.
    Raises InputError on a file that is none of these, and on a tensor that is missing, unknown or of another shape.
    """
    if isinstance(path_or_state_dict, Mapping):
        name, state, found = "the state dict", dict(path_or_state_dict), None
    else:
        name, path = str(path_or_state_dict), Path(path_or_state_dict)
        state, found = read_weights(path, trust_torchscript), path if path.is_dir() else path.parent
    layout, state, ignored = to_hugging_face(state, name)
    if config is None and found is not None:
        config = read_config(found, layout == "OpenAI CLIP")
    arguments, guessed = infer_arguments(state, config or {}, name, heads, activation)
    arguments["roi_projection"] = roi_projection or "roi_projection.weight" in state
    model = build_empty(arguments, state, name)
    made = make_missing(state, model)
    fill(model, state, name)
    model.config["logit_scale"] = model.logit_scale.item()
    loaded = tuple(k for k in state if k not in made)
    model.load_report = LoadReport(name, layout, loaded, made, tuple(ignored), tuple(guessed))
    return model


def build_empty(arguments: Mapping, state: Mapping[str, Tensor], source: str) -> FGCLIP:
    """FGCLIP(**arguments) on the meta device, of keywords that stand in a file beside so many tensors: however large a
    model they speak of, it takes no memory. Raises InputError where there is no such model."""
    try:
        arguments = dict(arguments)
        for tower in ("vision", "text"):
            arguments[tower] = sizes = dict(arguments.get(tower) or {})
            for key, value in sizes.items():
                if key == "eps":
                    sizes[key] = number(value, f"{source}: {tower}, eps", 0, 1)
                elif key != "activation" and (key, value) != ("eos_id", None):
                    most = len(state) if key == "layers" else 2**31
                    sizes[key] = number(value, f"{source}: {tower}, {key}", int(key != "eos_id"), most, whole=True)
        with torch.device("meta"):
            return FGCLIP(**arguments)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} describes no model that can be built: {reason(error)}") from error


def fill(model: FGCLIP, state: dict[str, Tensor], source: str) -> None:
    """Puts copies of the tensors in the place of the model's parameters, in float32 on the CPU. Raises InputError."""
    check_complete(state, model, source)
    own = {
        k: v.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format) for k, v in state.items()
    }
    model.load_state_dict(own, assign=True)


def to_hugging_face(state: dict[str, Tensor], name: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """The layout's name, the tensors under Hugging Face's names, and the source tensors that are no weights."""
    if "visual.layer1.0.conv1.weight" in state:
        raise InputError(f"{name} is a CLIP with a ResNet; expected one with a vision transformer")
    if "visual.conv1.weight" in state:
        kept = {k: v for k, v in state.items() if k not in OPENAI_FACTS}
        converted = {new: v for k, tensor in kept.items() for new, v in from_openai(k, tensor, name).items()}
        return "OpenAI CLIP", converted, [k for k in state if k in OPENAI_FACTS]
    if VISION + "patch_embedding.weight" in state and TEXT + "token_embedding.weight" in state:
        ignored = [k for k in state if k.endswith("embeddings.position_ids")]  # a buffer of old files
        layout = "FG-CLIP" if "text_filip_projection.weight" in state else "Hugging Face CLIP"
        return layout, {k: v for k, v in state.items() if k not in ignored}, ignored
    first = ", ".join(list(state)[:3]) or "nothing"
    raise InputError(f"{name} holds no CLIP with a vision transformer and text; its first tensors are {first}")


def from_openai(key: str, tensor: Tensor, name: str) -> dict[str, Tensor]:
    """One OpenAI tensor under its Hugging Face name or, for stacked queries, keys and values, names."""
    if key in OPENAI_TENSORS:
        return {OPENAI_TENSORS[key]: tensor.T if key in OPENAI_TRANSPOSED else tensor}
    module, _, kind = key.rpartition(".")
    if module in OPENAI_MODULES:
        return {f"{OPENAI_MODULES[module]}.{kind}": tensor}
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if block is not None:
        tower, layer, part, kind = block.groups()
        prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}."
        if part == "attn.in_proj":
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{prefix}self_attn.{letter}_proj.{kind}": third for letter, third in thirds}
        if part in OPENAI_BLOCK:
            return {f"{prefix}{OPENAI_BLOCK[part]}.{kind}": tensor}
    raise InputError(f"{name}: the tensor {key} has no place in CLIP")


def infer_arguments(
    state: dict[str, Tensor], config: dict, name: str, heads: Sequence[int] | None, activation: str | None
) -> tuple[dict, list[str]]:
    """The keywords of FGCLIP from the tensors' shapes and, for what shapes do not tell, the Hugging Face config or what
    is given; and what neither tells and is guessed."""

    def shape(key: str, dims: int) -> torch.Size:
        if key not in state or state[key].ndim != dims:
            raise InputError(f"{name}: expected a tensor {key} with {dims} dimensions")
        return state[key].shape

    width, _, patch, _ = shape(VISION + "patch_embedding.weight", 4)
    side = round(max(shape(VISION + "position_embedding.weight", 2)[0] - 1, 0) ** 0.5)
    vocab, text_width = shape(TEXT + "token_embedding.weight", 2)
    length = shape(TEXT + "position_embedding.weight", 2)[0]
    vision, text = dict(width=width, image_size=side * patch, patch_size=patch), dict(width=text_width)
    text |= dict(vocab_size=vocab, context_length=length)
    towers, guessed = dict(vision=vision, text=text), []
    for tower, sizes in towers.items():
        prefix = f"{tower}_model.encoder.layers."
        sizes["layers"] = len({k.split(".")[3] for k in state if k.startswith(prefix)})
        sizes["mlp_width"] = shape(prefix + "0.mlp.fc1.weight", 2)[0]
    published = (width, vision["layers"], text_width, text["layers"]) in PUBLISHED
    for (tower, sizes), own_heads in zip(towers.items(), heads or (None, None), strict=True):
        section = config.get(f"{tower}_config") or {}
        said = [section.get("num_attention_heads", HUGGING_FACE_HEADS[tower]), section.get("hidden_act", "quick_gelu")]
        for key, given, told in zip(("heads", "activation"), (own_heads, activation), said, strict=True):
            if section and given not in (None, told):
                raise InputError(f"--{key}: the config of {name} says {shown(told)} for its {tower} tower")
            sizes[key] = told if section else given
        if sizes["heads"] is None:
            if not published:
                raise InputError(
                    f"{name}: how many attention heads models of widths {width} and {text_width} have is not known; "
                    "expected config.json or open_clip_config.json beside it, or --heads VISION TEXT"
                )
            sizes["heads"] = sizes["width"] // 64
            guessed.append(f"{sizes['heads']} heads in the {tower} tower (--heads)")
        if sizes["activation"] is None:
            sizes["activation"] = "quick_gelu"
            guessed.append(f"quick_gelu in the {tower} tower (--activation)")
        sizes["eps"] = section.get("layer_norm_eps", 1e-5)
        check_config(section, sizes, f"{name}, {tower}_config")
    end = (config.get("text_config") or {}).get("eos_token_id")
    text["eos_id"] = None if end == 2 else end  # 2: files of before the id was corrected
    return dict(vision=vision, text=text, embed_dim=shape("visual_projection.weight", 2)[0]), guessed


def check_config(section: dict, sizes: dict, name: str) -> None:
    """Raises InputError where the config speaks of another model than the tensors, or of one that is not built here."""
    named = dict(hidden_size="width", num_hidden_layers="layers", intermediate_size="mlp_width")
    named |= dict(image_size="image_size", patch_size="patch_size", vocab_size="vocab_size")
    for key, ours in named.items():
        if key in section and ours in sizes and section[key] != sizes[ours]:
            raise InputError(f"{name}: {key} is {shown(section[key])}, but the weights have {sizes[ours]}")
    if sizes["activation"] not in tuple(ACTIVATIONS):
        expected = ", ".join(ACTIVATIONS)
        raise InputError(f"{name}: hidden_act is {shown(sizes['activation'])}; expected one of {expected}")
    heads = number(sizes["heads"], f"{name}, num_attention_heads", 1, sizes["width"], whole=True)
    if sizes["width"] % heads:
        raise InputError(f"{name}: a width of {sizes['width']} does not divide into {heads} attention heads")


def make_missing(state: dict[str, Tensor], model: FGCLIP) -> dict[str, str]:
    """Adds to `state` what plain CLIP lacks, each from what it takes over; returns name -> origin."""
    tables = {TEXT + f"position_embedding_{k}.weight": TEXT + "position_embedding.weight" for k in ("res", "ori")}
    origins = tables | {
        "text_filip_projection.weight": "text_projection.weight",
        "logit_scale_finegraind": "logit_scale",
        "logit_scale_hardneg": "logit_scale",
        "roi_projection.weight": "visual_projection.weight",
    }
    made = {}
    for target in model.state_dict():
        origin = origins.get(target)
        if target not in state and origin in state:
            state[target] = stretch_positions(state[origin].float()) if target in tables else state[origin]
            made[target] = f"{'stretched ' if target in tables else ''}{origin}"
    return made


def check_complete(state: dict[str, Tensor], model: FGCLIP, name: str) -> None:
    """Raises InputError unless the tensors are exactly the model's parameters, and finite numbers."""
    expected = model.state_dict()
    if missing := [k for k in expected if k not in state]:
        raise InputError(f"{name} lacks {len(missing)} tensors, among them {', '.join(missing[:3])}")
    if unknown := [k for k in state if k not in expected]:
        raise InputError(f"{name}: {len(unknown)} tensors have no place in CLIP, among them {', '.join(unknown[:3])}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise InputError(f"{name}: {key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")
        if not state[key].is_floating_point() or not state[key].isfinite().all():
            raise InputError(f"{name}: {key} holds whole numbers, or some that are not finite")


def hugging_face_config(model: FGCLIP) -> dict:
    """The config.json of a model, from which `load_clip_weights` builds the same."""
    sections = {}
    for name, tower in (("vision_config", model.vision_model), ("text_config", model.text_model)):
        block = tower.encoder.layers[0]
        sections[name] = dict(
            hidden_size=tower.width,
            intermediate_size=block.mlp.fc1.out_features,
            num_hidden_layers=len(tower.encoder.layers),
            num_attention_heads=block.self_attn.heads,
            hidden_act=next(k for k, function in ACTIVATIONS.items() if function is block.mlp.activation),
            layer_norm_eps=block.layer_norm1.eps,
            projection_dim=model.visual_projection.out_features,
        )
    vision, text = model.vision_model, model.text_model
    sections["vision_config"] |= dict(image_size=vision.image_size, patch_size=vision.patch_size)
    sections["text_config"] |= dict(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        eos_token_id=2 if text.eos_id is None else text.eos_id,
    )
    return dict(
        architectures=["FGCLIPModel"],
        model_type="clip",
        projection_dim=model.visual_projection.out_features,
        logit_scale_init_value=model.logit_scale.item(),
        **sections,
    )


def save_clip_weights(model: FGCLIP, directory: str | Path) -> None:
    """Writes model.safetensors and config.json in the FG-CLIP layout, each complete or not at all.

    Raises InputError without the safetensors package.
    """
    directory = Path(directory)
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(f'{directory} needs the safetensors package: pip install "macl-fgclip[text]"') from error
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with whole_file(directory / "model.safetensors") as file:
        file.write(save(state, metadata={"format": "pt"}))
    write_json(directory / "config.json", hugging_face_config(model), indent=1)
