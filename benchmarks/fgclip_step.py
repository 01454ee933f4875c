"""How fast is a training step of FG-CLIP beside the same towers in plain PyTorch, and how much memory does it take?

    python benchmarks/fgclip_step.py                          # drawn scenes, batch 32, all four losses, a bank of 128
    python benchmarks/fgclip_step.py --device cuda --amp bf16 --size base --batch-size 64 --bank-sizes 0,4096,65536

The plain form has the same weights in nn.TransformerEncoder, torchvision's roi_align, and F.cross_entropy over the
whole matrix of logits. It gets the same batch, with each distinct text once, and gives the same losses. The steps
(forward, losses, backward, AdamW, and the bank's new entries) take turns in one process. Peak memory is that of a fresh
process each, above what it held before its first step, which includes the bank.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trainkit.process_setup  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

import fgclip
from benchmarks import common
from fgclip.data import Collate
from trainkit.device import autocast, to_device
from fgclip.losses import PairBank, hard_negative_loss, symmetric_loss
from fgclip.model import l2_normalize
from fgclip.synthetic import PHRASES, SyntheticRegions
from fgclip.tokenizer import learn_merges
from fgclip.transformer import quick_gelu
from trainkit.arguments import int_list

SIZES = {
    "small": dict(
        vision=dict(image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_width=512),
        text=dict(vocab_size=1024, width=128, layers=4, heads=4, mlp_width=512),
        embed_dim=128,
    ),
    "base": dict(vision=dict(image_size=224)),  # FG-CLIP's published one
}
WEIGHTS = dict(long=1.0, short=1.0, region=0.1, hard=0.5)
LR = 1e-4
NAMES = ("fgclip", "plain")


def plain_encoder(encoder: nn.Module) -> nn.TransformerEncoder:
    """Our blocks, weights and all, as nn.TransformerEncoder."""
    first = encoder.layers[0]
    width, hidden = first.mlp.fc1.in_features, first.mlp.fc1.out_features
    layer = nn.TransformerEncoderLayer(
        width, first.self_attn.heads, hidden, dropout=0.0, activation=quick_gelu, batch_first=True, norm_first=True
    )
    plain = nn.TransformerEncoder(layer, len(encoder.layers), enable_nested_tensor=False)
    for theirs, ours in zip(plain.layers, encoder.layers, strict=True):
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(ours.self_attn, f"{letter}_proj"), kind) for letter in "qkv"]
            getattr(theirs.self_attn, f"in_proj_{kind}").data.copy_(torch.cat(parts))
        theirs.self_attn.out_proj.load_state_dict(ours.self_attn.out_proj.state_dict())
        theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
        theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())
        theirs.norm1.load_state_dict(ours.layer_norm1.state_dict())
        theirs.norm2.load_state_dict(ours.layer_norm2.state_dict())
    return plain


class PlainFGCLIP(nn.Module):
    """FG-CLIP as one would write it down, with the weights of `model`."""

    def __init__(self, model: fgclip.FGCLIP):
        super().__init__()
        self.vision, self.text = (plain_encoder(t.encoder) for t in (model.vision_model, model.text_model))
        self.rest = copy.deepcopy(model)  # embeddings, norms, projections, scales
        del self.rest.vision_model.encoder, self.rest.text_model.encoder

    def encode_text(self, tokens: Tensor, long: bool) -> Tensor:
        tower = self.rest.text_model
        x = tower.embeddings(tokens, long)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device, dtype=x.dtype)
        x = tower.final_layer_norm(self.text(x, mask=mask, is_causal=True))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # the end token has the largest id
        return (self.rest.text_filip_projection if long else self.rest.text_projection)(x)

    def encode_regions(self, x: Tensor, boxes: list[Tensor], size: tuple[int, int]) -> Tensor:
        """The value path of the last block, projected, and pooled inside each box; x (B, 1 + h * w, C) before it."""
        last, width = self.vision.layers[-1], x.shape[-1]
        weight, bias = last.self_attn.in_proj_weight, last.self_attn.in_proj_bias
        x = x + last.self_attn.out_proj(F.linear(last.norm1(x), weight[2 * width :], bias[2 * width :]))
        x = x + last.linear2(quick_gelu(last.linear1(last.norm2(x))))
        dense = self.rest.visual_projection(self.rest.vision_model.post_layernorm(x[:, 1:]))  # (B, h * w, D)
        dense = dense.transpose(1, 2).unflatten(2, size).float()  # (B, D, h, w)
        scale = dense.new_tensor([size[1], size[0], size[1], size[0]])
        return roi_align(dense, [box * scale for box in boxes], (1, 1), 1.0, -1, True)[..., 0, 0]

    def forward(self, batch: dict) -> dict[str, Tensor]:
        tower = self.rest.vision_model
        x, size = tower.embeddings(batch["pixels"])
        x = tower.pre_layrnorm(x)
        for layer in self.vision.layers[:-1]:
            x = layer(x)
        pooled = tower.post_layernorm(self.vision.layers[-1](x)[:, 0])
        short = self.encode_text(batch["short_texts"], long=False)
        return {
            "image": self.rest.visual_projection(pooled),
            "short": short[batch["short"]],
            "long": self.encode_text(batch["long_texts"], long=True)[batch["long"]],
            "regions": self.encode_regions(x, batch["boxes"], size),
            "region_texts": short[batch["region"]],
            "hard_texts": short[batch["hard"]],
            **{f"scale_{name}": scale for name, scale in self.rest.logit_scales().items()},
        }


def plain_symmetric_loss(image: Tensor, text: Tensor, scale: Tensor, *, ids: Tensor, bank: PairBank | None) -> Tensor:
    """`symmetric_loss` by way of the whole matrix of logits."""
    target, total = torch.arange(len(image), device=image.device), 0.0
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    for query, key, side in ((image, text, "texts"), (text, image, "images")):
        same = (ids[:, None] == ids) & ~own
        if bank is not None and len(bank):
            queued, queued_ids = getattr(bank, side)[0].features, getattr(bank, side)[0].ids
            key, same = torch.cat([key, queued]), torch.cat([same, ids[:, None] == queued_ids], dim=1)
        logits = (scale * query @ key.T).masked_fill(same, -torch.inf)  # (N, N + K)
        total = total + F.cross_entropy(logits, target) / 2
    return total


def plain_hard_loss(region: Tensor, text: Tensor, scale: Tensor, *, counts: Tensor, ids: Tensor) -> Tensor:
    """`hard_negative_loss` of the drawn scenes, in which all groups are of one size and no alteration is the phrase."""
    logits = scale * torch.einsum("kd,kmd->km", region, text.unflatten(0, (len(counts), -1)))
    return F.cross_entropy(logits, torch.zeros_like(counts))


def losses_of(features: dict, batch: dict, bank: PairBank | None, symmetric, hard) -> dict[str, Tensor]:
    """The named losses of a batch; afterwards its regions are in the bank.

    symmetric, hard: `symmetric_loss` and `hard_negative_loss`, or their plain forms.
    """
    losses, image = {}, l2_normalize(features["image"])
    for name in ("long", "short"):
        if name in features:
            ids = batch[f"{name}_ids"][batch[name]]
            losses[name] = symmetric(image, l2_normalize(features[name]), features["scale_global"], ids=ids, bank=None)
    if "regions" in features:
        region, text = l2_normalize(features["regions"]), l2_normalize(features["region_texts"])
        ids = batch["short_ids"][batch["region"]]
        losses["region"] = symmetric(region, text, features["scale_region"], ids=ids, bank=bank)
        if bank is not None:
            bank.enqueue(region, text, ids)
    if "hard_texts" in features:
        region, text = l2_normalize(features["regions"])[batch["hard_regions"]], l2_normalize(features["hard_texts"])
        ids = batch["short_ids"][batch["hard"]]
        losses["hard"] = hard(region, text, features["scale_hard"], counts=batch["hard_counts"], ids=ids)
    return losses


class Contender:
    """A model, "fgclip" or "plain", with its optimizer and a full bank."""

    def __init__(self, name: str, args: argparse.Namespace, batch: dict, bank_size: int = 0):
        self.name, self.args, self.batch, self.bank = name, args, batch, None
        torch.manual_seed(0)
        model = fgclip.FGCLIP(**SIZES[args.size])
        dim = model.visual_projection.out_features
        if name == "plain":
            model = PlainFGCLIP(model)
        self.model = model.to(args.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        if bank_size:
            self.bank = PairBank(bank_size, dim, device=args.device)
            torch.manual_seed(1)  # the forms draw different amounts when they are built
            pairs = l2_normalize(torch.randn(2, bank_size, dim, device=args.device))
            self.bank.enqueue(*pairs, torch.arange(bank_size, device=args.device) + 2**40)

    def losses(self) -> dict[str, Tensor]:
        with autocast(self.args.amp, self.args.device):
            output = self.model(self.batch)
            if self.name == "plain":
                return losses_of(output, self.batch, self.bank, plain_symmetric_loss, plain_hard_loss)
            return losses_of(output, self.batch, self.bank, symmetric_loss, hard_negative_loss)

    def step(self) -> None:
        sum(WEIGHTS[name] * loss for name, loss in self.losses().items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_batch(args: argparse.Namespace) -> dict:
    scenes = SyntheticRegions(args.batch_size, seed=0, image_size=SIZES[args.size]["vision"]["image_size"])
    records = [scenes.record(i) for i in range(len(scenes))]
    words = learn_merges([*PHRASES, *(text for record in records for text in (record.long, *record.short))])
    collate = Collate(fgclip.Tokenizer(words), regions=True, long_context_length=248)
    return to_device(collate([scenes[i] for i in range(args.batch_size)]), args.device)


def main() -> None:
    parser = common.make_parser(__doc__, rounds=7)
    common.add_step_flags(parser, batch_size=32)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the towers (default: small)")
    parser.add_argument("--bank-size", type=int, default=128, help="places in the bank when speed is measured")
    parser.add_argument("--bank-sizes", type=int_list, default="0,4096,65536", help="when memory is measured")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "BANK_SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = make_batch(args)
    if args.memory_of:
        contender = Contender(args.memory_of[0], args, batch, int(args.memory_of[1]))
        return print(common.extra_memory(lambda: [contender.step() for _ in range(3)], args.device))

    counts = [len(batch[name]) for name in ("region", "short_texts", "long_texts")]
    contenders = {name: Contender(name, args, batch, args.bank_size) for name in NAMES}
    with torch.no_grad():
        ours, plain = (contender.losses() for contender in contenders.values())
    torch.testing.assert_close(ours, plain, rtol=1e-4 if args.amp == "none" else 0.02, atol=0)
    times = common.take_turns({name: contender.step for name, contender in contenders.items()}, args.rounds, warmup=2)
    peaks = [
        [str(size), *(f"{common.in_fresh_process('--memory-of', name, str(size)):.1f}" for name in NAMES)]
        for size in args.bank_sizes
    ]
    report = [
        f"# FG-CLIP training step, {args.size} towers, batch {args.batch_size}, amp {args.amp}",
        "{} regions, {} distinct short and {} long texts; ".format(*counts)
        + f"{common.machine(args.device, ('torchvision',))}; {args.rounds} rounds",
        f"All four losses, a bank of {args.bank_size}:",
        common.table(common.TIME_COLUMNS, common.time_rows(times, "fgclip")),
        "Peak memory of a step, in MiB above what is held before it:",
        common.table(["places in the bank", *NAMES], peaks),
    ]
    common.finish(report, f"fgclip-step-{args.device}-{args.amp}", args.write)


if __name__ == "__main__":
    main()
