"""Parts of the towers that do not learn: they run without graph and in evaluation mode, and no optimizer knows them."""

from collections.abc import Collection

from fgclip.model import FGCLIP, TOWERS
from trainkit.errors import InputError


def freeze(model: FGCLIP, parts: Collection[str]) -> None:
    """Freezes "vision" or "text", a tower with its projections, or "text:6", its embeddings and first 6 blocks.

    A projection of the regions' own goes on learning.
    Call it before an optimizer and DDP are made. Raises InputError on other words, and where there are fewer blocks.
    """
    for part in parts:
        name, colon, count = part.partition(":")
        tower = getattr(model, f"{name}_model") if name in TOWERS else None
        if tower is None or (colon and not (count.isdecimal() and int(count) <= len(tower.encoder.layers))):
            most = f"vision:{len(model.vision_model.encoder.layers)} or text:{len(model.text_model.encoder.layers)}"
            raise InputError(f"--freeze {part}: expected vision, text, or first blocks of one, at most {most}")
        frozen = [getattr(model, each) for each in TOWERS[name][1] if hasattr(model, each) and each != "roi_projection"]
        if colon:
            below = [tower.embeddings, tower.pre_layrnorm] if name == "vision" else [tower.embeddings]
            frozen = [*below, *tower.encoder.layers[: int(count)]]
        for module in frozen:
            module.requires_grad_(False)


def train_unfrozen(model: FGCLIP) -> None:
    """Training mode for every module with a parameter that learns, evaluation mode for the others."""
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())
