"""How fast is a training step of FG-CLIP beside the same towers in plain PyTorch, and how much memory does it take?

    python benchmarks/fgclip_step.py                          # drawn scenes, batch 32, all four losses, a bank of 128
    python benchmarks/fgclip_step.py --device cuda --amp bf16 --size base --batch-size 64 --bank-sizes 0,4096,65536

The plain form has the same weights in nn.TransformerEncoder, torchvision's roi_align and F.cross_entropy over the whole
matrix of logits; it is given the same batch, each distinct text once and no longer than need be, and gives the same
losses. Where open_clip is installed, its model and loss on images and short captions stand against ours on the same.
The steps (forward, losses, backward, AdamW, and the bank's new entries) take turns in one process, so that whatever
else the machine does meets all: what counts is the ratio. Peak memory is measured in a process of its own each, above
what the process held before its first step, the bank's own rows among that.
"""

import argparse
import contextlib
import copy
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training.host  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

import fgclip
from fgclip.batches import Collate, to_device
from fgclip.losses import PairBank, contrast_pairs, hard_negative_loss, symmetric_loss
from fgclip.model import unit
from fgclip.synthetic import PHRASES, SyntheticRegions
from fgclip.tokenizer import learn_merges
from fgclip.transformer import quick_gelu
from training.arguments import int_list

AMP = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = {
    "small": dict(
        vision=dict(image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_width=512),
        text=dict(vocab_size=1024, width=128, layers=4, heads=4, mlp_width=512),
        embed_dim=128,
    ),
    "base": dict(),  # FG-CLIP's published one
}
EMBED_DIM = {"small": 128, "base": 512}
WEIGHTS = dict(long=1.0, short=1.0, region=0.1, hard=0.5)
LR = 1e-4


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


class Plain(nn.Module):
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
        features = {"image": self.rest.visual_projection(pooled), "short": short[batch["short"]]}
        if "boxes" in batch:
            features["regions"] = self.encode_regions(x, batch["boxes"], size)
            features |= dict(region_texts=short[batch["region"]], hard_texts=short[batch["hard"]])
            features["long"] = self.encode_text(batch["long_texts"], long=True)[batch["long"]]
        return features | {f"scale_{name}": scale for name, scale in self.rest.logit_scales().items()}


def plain_contrast(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, bank: PairBank | None) -> Tensor:
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


def plain_hard(region: Tensor, text: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    """`hard_negative_loss` of the drawn scenes, in which all groups are of one size and no alteration is the phrase."""
    logits = scale * torch.einsum("kd,kmd->km", region, text.unflatten(0, (len(counts), -1)))
    return F.cross_entropy(logits, torch.zeros_like(counts))


def losses_of(features: dict, batch: dict, bank: PairBank | None, plain: bool) -> dict[str, Tensor]:
    """The named losses of a batch; afterwards its regions are in the bank."""
    pairs = contrast_pairs(features, batch)
    losses = {}
    for name, (image, text, scale, ids, _) in pairs.items():
        own_bank = bank if name == "region" else None
        if plain:
            losses[name] = plain_contrast(image, text, scale, ids, own_bank)
        else:
            losses[name] = symmetric_loss(image, text, scale, ids=ids, bank=own_bank)
    if "hard_texts" in features:
        region, text = unit(features["regions"])[batch["hard_regions"]], unit(features["hard_texts"])
        scale, counts = features["scale_hard"], batch["hard_counts"]
        if plain:
            losses["hard"] = plain_hard(region, text, scale, counts)
        else:
            losses["hard"] = hard_negative_loss(
                region, text, scale, counts=counts, ids=batch["short_ids"][batch["hard"]]
            )
    if bank is not None and "region" in pairs:
        bank.enqueue(pairs["region"].image, pairs["region"].text, pairs["region"].ids)
    return losses


class OpenCLIP(nn.Module):
    """open_clip's model of the same sizes (weights of its own) and its loss, on images and short captions.

    Its text tower always reads its whole context, 77 tokens as a rule; here it is made as short as the batch's texts.
    """

    def __init__(self, model: fgclip.FGCLIP, context_length: int):
        super().__init__()
        import open_clip

        vision, text = model.vision_model, model.text_model
        heads = vision.encoder.layers[0].self_attn.heads
        self.model = open_clip.CLIP(
            embed_dim=model.visual_projection.out_features,
            vision_cfg=dict(
                layers=len(vision.encoder.layers), width=vision.width, head_width=vision.width // heads,
                patch_size=vision.patch_size, image_size=vision.image_size,
            ),
            text_cfg=dict(
                context_length=context_length, vocab_size=text.vocab_size, width=text.width,
                heads=text.encoder.layers[0].self_attn.heads, layers=len(text.encoder.layers),
            ),
            quick_gelu=True,
        )  # fmt: skip
        self.loss = open_clip.ClipLoss()

    def losses(self, batch: dict) -> dict[str, Tensor]:
        return {"short": self.loss(*self.model(batch["pixels"], batch["short_texts"][batch["short"]])[:3])}


class Contender:
    """A model with its optimizer and bank, and the step that they make of a batch."""

    def __init__(self, name: str, args: argparse.Namespace, batch: dict, bank_size: int = 0):
        self.name, self.device, self.dtype = name, args.device, AMP[args.amp]
        torch.manual_seed(0)
        model = fgclip.FGCLIP(**SIZES[args.size])
        if name == "plain":
            model = Plain(model)
        elif name == "open_clip":
            model = OpenCLIP(model, batch["short_texts"].shape[1])
        self.model = model.to(args.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.bank = None
        if bank_size:
            self.bank = PairBank(bank_size, EMBED_DIM[args.size], device=args.device)
            generator = torch.Generator().manual_seed(1)
            for rows in torch.arange(bank_size).split(1024):  # in pieces, so that filling it is not the peak
                pairs = unit(torch.randn(2, len(rows), EMBED_DIM[args.size], generator=generator)).to(args.device)
                self.bank.enqueue(*pairs, rows.to(args.device) + 2**40)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        if self.name == "open_clip":
            return self.model.losses(batch)
        return losses_of(self.model(batch), batch, self.bank, plain=self.name == "plain")

    def step(self, batch: dict) -> tuple[float, dict[str, float]]:
        """Seconds of one step, and its losses."""
        began = time.perf_counter()
        with torch.autocast(self.device, dtype=self.dtype) if self.dtype else contextlib.nullcontext():
            losses = self.losses(batch)
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, {name: loss.item() for name, loss in losses.items()}


def make_batch(args: argparse.Namespace, regions: bool) -> dict:
    tower = SIZES[args.size].get("vision", dict(image_size=224))
    scenes = SyntheticRegions(args.batch_size, seed=0, image_size=tower["image_size"])
    records = [scenes.record(i) for i in range(len(scenes))]
    words = learn_merges([*PHRASES, *(text for record in records for text in (record.long, *record.short))])
    collate = Collate(fgclip.Tokenizer(words), regions=regions, long_context_length=248 if regions else None)
    return to_device(collate([scenes[i] for i in range(args.batch_size)]), args.device)


def interleave(contenders: list[Contender], batch: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of the steps of each, which take turns. The first losses of ours and of the plain form must agree."""
    tolerance = 1e-4 if contenders[0].dtype is None else 0.02
    seconds = {one.name: [] for one in contenders}
    for round_ in range(rounds + 2):
        losses = {}
        for one in contenders:
            taken, losses[one.name] = one.step(batch)
            if round_ >= 2:  # the first two warm up
                seconds[one.name].append(taken)
        if round_ == 0:
            for name, value in losses["fgclip"].items():
                theirs = losses["plain"][name]
                if abs(value - theirs) > tolerance * abs(theirs):
                    raise SystemExit(f"the loss {name} is {value} here and {theirs} in plain form; it must be the same")
    return seconds


def status(field: str) -> float:
    """MiB, of this process."""
    # Not ru_maxrss, which a process inherits from the one that started it (getrusage(2), Linux).
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**10


def measure_memory(args: argparse.Namespace) -> None:
    """Print the MiB at the most, above what is held before, of three steps of one contender."""
    name, bank_size = args.memory_of.split(",")
    batch = make_batch(args, regions=True)
    one = Contender(name, args, batch, int(bank_size))
    cuda = args.device == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        one.step(batch)
    print((torch.cuda.max_memory_allocated() / 2**20 if cuda else status("VmHWM")) - before)


def peak_memory(args: argparse.Namespace, name: str, bank_size: int) -> float:
    command = [sys.executable, __file__, "--memory-of", f"{name},{bank_size}"]
    for flag in ("batch_size", "size", "device", "amp", "threads"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def speed_rows(seconds: dict[str, list[float]], case: str) -> list[str]:
    rows = []
    for name, values in seconds.items():
        ratios = sorted(t / own for t, own in zip(values, seconds["fgclip"], strict=True))
        against = "" if name == "fgclip" else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        times = " | ".join(f"{v:.3f}" for v in (statistics.median(values), min(values), max(values)))
        rows.append(f"| {case} | {name} | {times} | {against} |")
    return rows


def report(args: argparse.Namespace) -> list[str]:
    machine = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads, {platform.machine()}"
    )
    batch = make_batch(args, regions=True)
    counts = f"{len(batch['region'])} regions, {len(batch['short_texts'])} distinct short and "
    counts += f"{len(batch['long_texts'])} long texts"
    lines = [
        f"# FG-CLIP training step, {args.size} towers, batch {args.batch_size}, amp {args.amp}",
        "",
        f"{counts}; {machine}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}; "
        f"{args.rounds} interleaved rounds",
        "",
        "| losses | form | median s | min s | max s | time over ours, median of the rounds (all) |",
        "|---|---|---|---|---|---|",
    ]
    whole = [Contender(name, args, batch, args.bank_size) for name in ("fgclip", "plain")]
    lines += speed_rows(interleave(whole, batch, args.rounds), f"all four, bank {args.bank_size}")
    installed = find_spec("open_clip") is not None
    names = ["fgclip", "plain"] + (["open_clip"] if installed else [])
    batch = make_batch(args, regions=False)
    short = [Contender(name, args, batch) for name in names]
    lines += speed_rows(interleave(short, batch, args.rounds), "short captions")
    lines += ["", f"open_clip {version('open_clip_torch')}" if installed else "open_clip is not installed"]
    lines += ["", "Peak memory of a step with all four losses, in MiB above what is held before it:", ""]
    lines += ["| places in the bank | its own rows | fgclip | plain |", "|---|---|---|---|"]
    for size in args.bank_sizes:
        own = 2 * size * (4 * EMBED_DIM[args.size] + 8) / 2**20
        peaks = " | ".join(f"{peak_memory(args, name, size):.1f}" for name in ("fgclip", "plain"))
        lines.append(f"| {size} | {own:.1f} | {peaks} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="images a step")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the towers")
    parser.add_argument("--bank-size", type=int, default=128, help="places in the bank, when speed is measured")
    parser.add_argument("--bank-sizes", type=int_list, default="0,4096,65536", help="when memory is measured")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=tuple(AMP), default="none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return measure_memory(args)
    lines = report(args)
    print("\n".join(lines))
    if args.write:
        path = Path(__file__).resolve().parent / "results" / f"fgclip-step-{args.device}-{args.amp}.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
