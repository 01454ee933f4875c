"""FG-CLIP (Xie et al. 2025): CLIP with a long text path, features of image regions and one temperature per loss."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgclip.regions import boxes_to_rois
from fgclip.text import TextTower
from fgclip.vision import VisionTower, interpolate_positions
from kernels import roi_align_project
from trainkit.device import at_least_float32, to_device

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
# Of each tower what goes in, and the modules on its way.
_TEXTS = ("short_texts", "short", "region", "hard", "long_texts", "long")
TOWERS = dict(vision=(("pixels", "boxes"), ("vision_model", "visual_projection", "roi_projection")))
TOWERS |= dict(text=(_TEXTS, ("text_model", "text_projection", "text_filip_projection")))


def l2_normalize(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Rows divided by their length, in float32 at least. A row shorter than eps becomes zero, with gradient zero."""
    features = at_least_float32(features)
    length = features.norm(dim=-1, keepdim=True)
    return torch.where(length <= eps, 0.0, features / length.clamp(min=eps))  # NaN stays NaN, so that it is seen


class FGCLIP(nn.Module):
    """Two towers, their projections, and three learned temperatures. The defaults are the published base size.

    vision, text: the keywords of `VisionTower` and `TextTower` that differ from their defaults.
    embed_dim: width D of every feature.
    logit_scale: initial logarithm of the three scales.
    roi_projection: give regions a projection of their own, a copy of the image's at first.
    logit_bias: initial value of the two biases of the sigmoid loss, of images and of regions; None: without them.

    FGCLIP(**config) builds the same model again. The state dict has Hugging Face's names. Pixels are (B, 3, H, W),
    normalised with PIXEL_MEAN and PIXEL_STD.
    """

    def __init__(
        self, *, vision: dict | None = None, text: dict | None = None, embed_dim: int = 512,
        logit_scale: float = MAX_LOGIT_SCALE, roi_projection: bool = False,
        logit_bias: float | None = None,
    ):  # fmt: skip
        super().__init__()
        vision, text = dict(vision or {}), dict(text or {})
        self.config = dict(vision=vision, text=text, embed_dim=embed_dim, roi_projection=roi_projection)
        self.config |= dict(logit_scale=logit_scale, logit_bias=logit_bias)
        self.vision_model = VisionTower(**vision)
        self.text_model = TextTower(**text)
        self.visual_projection = nn.Linear(self.vision_model.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_model.width, embed_dim, bias=False)
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if self.text_model.long_context_length is not None:
            self.text_filip_projection = nn.Linear(self.text_model.width, embed_dim, bias=False)
            self.text_filip_projection.load_state_dict(self.text_projection.state_dict())
        if roi_projection:
            self.roi_projection = nn.Linear(self.vision_model.width, embed_dim, bias=False)
            self.roi_projection.load_state_dict(self.visual_projection.state_dict())
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_scale_finegraind = nn.Parameter(torch.tensor(float(logit_scale)))  # the published spelling
        self.logit_scale_hardneg = nn.Parameter(torch.tensor(float(logit_scale)))
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))
            self.logit_bias_region = nn.Parameter(torch.tensor(float(logit_bias)))

    def with_roi_projection(self) -> "FGCLIP":
        """The same model with a projection for the regions, at first a copy of the image's."""
        return self._rebuilt(dict(roi_projection=True), {"roi_projection.weight": self.visual_projection.weight})

    def with_logit_bias(self, value: float | None) -> "FGCLIP":
        """The same model with new biases for the sigmoid loss where it has none, or without any."""
        return self._rebuilt(dict(logit_bias=value), {})

    def with_image_size(self, image_size: int) -> "FGCLIP":
        """The same model with its position table interpolated for square images of that side."""
        side, table = image_size // self.vision_model.patch_size, self.vision_model.embeddings.position_embedding.weight
        tables = {"vision_model.embeddings.position_embedding.weight": interpolate_positions(table, (side, side))}
        return self._rebuilt(dict(vision=self.config["vision"] | dict(image_size=image_size)), tables)

    def _rebuilt(self, config: dict, state: dict[str, Tensor]) -> "FGCLIP":
        model = FGCLIP(**self.config | config)
        own, state = model.state_dict(), self.state_dict() | state
        model.load_state_dict({name: state.get(name, own[name]) for name in own})
        return model.to(self.logit_scale.device)

    def set_checkpointing(self, enabled: bool) -> None:
        """Whether the backward pass recomputes the blocks' activations: less memory, about a third more time."""
        self.vision_model.encoder.checkpointing = enabled
        self.text_model.encoder.checkpointing = enabled

    def log_scales(self) -> dict[str, nn.Parameter]:
        """The logarithms of the scales, by the loss they belong to."""
        scales = (self.logit_scale, self.logit_scale_finegraind, self.logit_scale_hardneg)
        return dict(zip(("global", "region", "hard"), scales, strict=True))

    def logit_scales(self) -> dict[str, Tensor]:
        """The multipliers of the cosines, exp of `log_scales`."""
        return {name: scale.exp() for name, scale in self.log_scales().items()}

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Holds the multipliers between 1 and 100. Call it after every optimizer step."""
        # A clamp in the forward pass would leave the parameter without a gradient, and outside for ever.
        for scale in self.log_scales().values():
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to image features (B, D), not normalised."""
        tokens, _ = self.vision_model.penultimate(pixels)
        return self.visual_projection(self.vision_model.pool(tokens))

    def encode_text(self, tokens: Tensor, long: bool = False, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (N, L) int64 to text features (N, D), not normalised.

        long: use the long table and its projection, for L up to 248 with the published 77 short positions.
        attention_mask: (N, L), 1 = read; padding behind the end token needs none.
        Raises ValueError where L exceeds the table.
        """
        pooled = self.text_model(tokens, long=long, attention_mask=attention_mask)
        return (self.text_filip_projection if long else self.text_projection)(pooled)

    def dense_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to the projected patch features (B, D, h, w), not normalised."""
        tokens, size = self.vision_model.penultimate(pixels)
        dense = self.vision_model.dense(tokens, size)  # (B, C, h, w)
        return self.visual_projection(dense.movedim(1, -1)).movedim(-1, 1)  # (B, D, h, w)

    def encode_regions(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Features (R, D) of R boxes, images in order, not normalised.

        boxes: one (n_i, 4) tensor per image, xyxy in 0..1. A box outside its image gives zeros.
        """
        tokens, size = self.vision_model.penultimate(pixels)
        return self._pool_regions(tokens, size, boxes)

    def _pool_regions(self, tokens: Tensor, size: tuple[int, int], boxes: Sequence[Tensor]) -> Tensor:
        """RoIAlign (He et al. 2017) to a single cell with as many samples as the box covers cells, projected."""
        if len(boxes) != len(tokens):
            raise ValueError(f"{len(boxes)} lists of boxes for {len(tokens)} images")
        dense = self.vision_model.dense(tokens, size)  # (B, C, h, w)
        weight = getattr(self, "roi_projection", self.visual_projection).weight
        rois = boxes_to_rois([b.to(dense.device, torch.float32) for b in boxes], size)
        return roi_align_project([dense], rois, weight, scales=[1.0], output_size=1, sampling_ratio=-1, aligned=True)

    def forward(self, batch: dict | list[dict]) -> dict[str, Tensor]:
        """Every feature that the losses of one batch need, not normalised, each distinct image and text encoded once.

        batch: any of
            pixels (B, 3, H, W);
            short_texts (U, L) tokens, and into its rows: short (B,), region (R,), hard (H,) int64;
            long_texts (V, L) tokens, long (B,) into its rows;
            boxes, with pixels, a list of B tensors (n_i, 4), R together.
        Of a list of batches, on any device, the features come together. The backward pass makes them again, batch by
        batch, so that memory holds the activations of one (the steps of GradCache, Gao et al. 2021).
        Returns image, short, long (B, D), regions, region_texts (R, D) and hard_texts (H, D), where the batch has what
        they are made of, the multipliers scale_global, scale_region and scale_hard, and biases where there are any.
        """
        if isinstance(batch, list):
            parts = [self._twice(part) for part in batch]
            features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            features = self._features(batch)
        if self.config["logit_bias"] is not None:
            features |= dict(bias_global=self.logit_bias, bias_region=self.logit_bias_region)
        return features | {f"scale_{name}": scale for name, scale in self.logit_scales().items()}

    def _features(self, batch: dict) -> dict[str, Tensor]:
        features = {}
        if "pixels" in batch:
            tokens, size = self.vision_model.penultimate(batch["pixels"])
            features["image"] = self.visual_projection(self.vision_model.pool(tokens))
            if "boxes" in batch:
                features["regions"] = self._pool_regions(tokens, size, batch["boxes"])
        if "short_texts" in batch:
            short = self.encode_text(batch["short_texts"])
            for name, index in (("short", "short"), ("region_texts", "region"), ("hard_texts", "hard")):
                if index in batch:
                    features[name] = F.embedding(batch[index], short)  # unlike indexing, repeats add up in one order
        if "long_texts" in batch:
            features["long"] = F.embedding(batch["long"], self.encode_text(batch["long_texts"], long=True))
        return features

    def _twice(self, batch: dict) -> dict[str, Tensor]:
        """`_features` without graph at first; a tower in which something learns runs again in the backward pass.

        Its parameters are inputs of the checkpoint, a reentrant one, so that DDP sees the sum of their gradients over
        all batches. A checkpoint returns tensors alone, so `_run` tells in `kinds` what they are.
        """
        features = {}
        for inputs, modules in TOWERS.values():
            part, kinds = {name: batch[name] for name in inputs if name in batch}, []
            learning = {n: p for n, p in self.named_parameters() if p.requires_grad and n.startswith(modules)}
            run = partial(self._run, part, kinds, list(learning))
            made = checkpoint(run, *learning.values(), use_reentrant=True) if learning and part else run()
            features |= zip(kinds, made, strict=True)
        return features

    def _run(self, batch: dict, kinds: list[str], names: list[str], *parameters: Tensor) -> tuple[Tensor, ...]:
        """The features of a batch, by the parameters of these names; `kinds` becomes what each is."""
        with torch.nn.utils.stateless._reparametrize_module(self, dict(zip(names, parameters, strict=True))):
            features = self._features(to_device(batch, self.logit_scale.device))
        kinds[:] = features
        return tuple(features.values())
