"""The loss of a training step with its memory banks, and its metrics."""

import math
from collections.abc import Collection, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

import trainkit.distributed as distributed
from fgclip.losses import hard_negative_loss, symmetric_loss
from fgclip.model import FGCLIP, l2_normalize
from trainkit.device import to_device

LOSSES = dict(long="sources", short="sources", region="region", hard="hard_regions")  # and what they average


class FGCLIPLoss:
    """The losses loss_long, loss_short, loss_region and loss_hard of a step's micro-batches.

    model: FGCLIP, in DDP or not.
    names: those of LOSSES that are computed.
    banks: the negatives of earlier steps, by name of a loss (not hard).

    Each step calls `begin` with its micro-batches, then the loss with each in turn, then `metrics`. A loss is a mean
    over the pairs of all micro-batches on all ranks: their average is that of one large batch, but for the number of
    negatives. A list of micro-batches stands for one batch of them all, negatives included, see `FGCLIP.forward`.
    """

    def __init__(self, model: nn.Module, *, names: Collection[str], banks: Mapping | nn.ModuleDict, device):
        self.model, self.names, self.banks, self.device = model, list(names), dict(banks.items()), device

    def begin(self, batches: list[dict | list[dict]], *, use_banks: bool = True) -> None:
        """Counts the pairs of the step over all ranks, and forgets the metrics of the last step."""
        counts = [[sum(len(part.get(key, ())) for part in parts_of(batch)) for key in LOSSES.values()]
                  for batch in batches]  # fmt: skip
        counts = distributed.all_reduce_sum(torch.tensor(counts, dtype=torch.float64))  # (micro-batches, LOSSES)
        totals = counts.sum(0)
        factors = torch.where(totals > 0, distributed.world_size() * len(counts) / totals, 0.0).tolist()
        self.factors = dict(zip(LOSSES, factors, strict=True))
        self.counts = (dict(zip(LOSSES, row, strict=True)) for row in counts)
        self.sums, self.use_banks = {}, use_banks

    def __call__(self, batch: dict | list[dict]) -> dict[str, Tensor]:
        """The losses () of the next micro-batch. Afterwards its pairs are in the banks."""
        pairs = to_device(pairs_of(batch), self.device)
        features = self.model(batch if isinstance(batch, list) else to_device(batch, self.device))
        counts = next(self.counts)
        losses, image = {}, l2_normalize(features["image"])
        for name in ("long", "short", "region"):
            if name in self.names:
                loss = self.contrast(name, image, features, pairs, counts[name])
                losses[f"loss_{name}"] = self.factors[name] * loss
        if "hard" in self.names:
            region, text = l2_normalize(features["regions"]), l2_normalize(features["hard_texts"])
            options = dict(counts=pairs["hard_counts"], ids=pairs["hard"], reduction="sum", with_stats=True)
            loss, stats = hard_negative_loss(region[pairs["hard_regions"]], text, features["scale_hard"], **options)
            losses["loss_hard"] = self.factors["hard"] * loss
            self.add_quality("hard", stats)
        self.add("truncated", pairs["truncated"], 0)
        for name in ("image", "short", "long", "regions", "region_texts"):
            if name in features:
                self.add(f"norm_{name}", features[name].detach().norm(dim=-1).sum(), len(features[name]))
        return losses

    def contrast(self, name: str, image: Tensor, features: dict, pairs: dict, count: Tensor) -> Tensor:
        """The summed loss of one kind of pairs, `count` of them on all ranks, among each other and the bank."""
        if name == "region":
            image, text, labels = l2_normalize(features["regions"]), features["region_texts"], pairs["region_labels"]
        else:
            text, labels = features[name], pairs["labels"]
        kind = "region" if name == "region" else "global"
        scale, bias = features[f"scale_{kind}"], features.get(f"bias_{kind}")
        text, ids, bank = l2_normalize(text), pairs[name], self.banks.get(name)
        used = bank if self.use_banks else None
        options = dict(ids=ids, reduction="sum", with_stats=True)
        loss, stats = symmetric_loss(image, text, scale, bank=used, bias=bias, **options)
        in_batch = stats
        if used is not None:
            count = count + len(bank)
            with torch.no_grad():
                in_batch = symmetric_loss(image, text, scale, **options)[1]
        if bank is not None:
            bank.enqueue(image, text, ids, labels)
        with torch.no_grad():
            self.add_quality(name, stats)
            self.add_quality(f"{name}_in_batch", in_batch)
            self.add(f"{name}_in_batch", in_batch["loss"], in_batch["rows"])
            self.add(f"{name}_candidates", count * stats["rows"], stats["rows"])
            self.add(f"{name}_unmasked", stats["candidates"], stats["rows"])
            self.add(f"{name}_cosine", (image * text).sum(), len(image))
            self.add(f"{name}_cosine_unmatched", *unmatched_cosines(image, text, ids))
        return loss

    def add_quality(self, name: str, stats: dict[str, Tensor]) -> None:
        self.add(f"{name}_relative", stats["loss_over_chance"], stats["rows_with_negatives"])
        self.add(f"{name}_r1", stats["top1"], stats["rows_with_negatives"])

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Adds a sum over so many values to the mean `name`; the names are the same on every rank."""
        totals, counts = self.sums.get(name, (0, 0))
        self.sums[name] = totals + total, counts + count

    def metrics(self) -> dict[str, float]:
        """The metrics of the step, over all micro-batches and ranks; NaN where nothing was counted.

        Of long, short and region, by their name:
            _relative: loss over ln(candidates), 1 is chance; _r1: share of rows whose own pair is first;
            _candidates: how many a row had, its own among them; _unmasked: those that are not of the same caption;
            _in_batch, _in_batch_relative, _in_batch_r1: loss, relative loss and R@1 without the bank;
            _cosine, _cosine_unmatched: means of the pairs, and of all others in a rank's micro-batch;
            _bank: pairs in the bank.
        These are of the softmax where the loss is the sigmoid one, too.
        Of the hard negatives hard_relative and hard_r1. norm_*: mean length of the features. truncated: texts cut.
        damaged: samples left out, where the caller adds them.
        """
        values = [value for pair in self.sums.values() for value in pair]
        values = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        values = distributed.all_reduce_sum(torch.stack(values).cpu()).view(-1, 2).tolist()
        sums = dict(zip(self.sums, values, strict=True))
        means = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        banks = {f"{name}_bank": len(self.banks[name]) for name in self.names if name in self.banks}
        counts = {name: int(sums[name][0]) for name in ("truncated", "damaged") if name in sums}
        return means | banks | counts


def parts_of(batch: dict | list[dict]) -> list[dict]:
    return batch if isinstance(batch, list) else [batch]


def pairs_of(batch: dict | list[dict]) -> dict:
    """What the losses know of a batch: ids of the texts of long, short, region and hard, and what tells the rows."""
    if isinstance(batch, list):
        first = [0, *accumulate(len(part.get("region", ())) for part in batch)]
        parts = [pairs_of(part) for part in batch]
        for part, regions in zip(parts, first, strict=False):
            part |= dict(hard_regions=part["hard_regions"] + regions) if "hard_regions" in part else {}
        whole = {name: [part[name] for part in parts] for name in parts[0]}
        return {name: sum(values) if name == "truncated" else torch.cat(values) for name, values in whole.items()}
    ids = {name: batch["long_ids" if name == "long" else "short_ids"][batch[name]] for name in LOSSES if name in batch}
    others = ("labels", "region_labels", "hard_regions", "hard_counts", "truncated")
    return ids | {name: batch[name] for name in others if name in batch}


def unmatched_cosines(image: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the cosines between unit rows (N, D) of different ids (N,), without the N x N matrix."""
    _, group, sizes = ids.unique(return_inverse=True, return_counts=True)
    images, texts = (rows.new_zeros(len(sizes), rows.shape[1]).index_add(0, group, rows) for rows in (image, text))
    return (images.sum(0) * texts.sum(0)).sum() - (images * texts).sum(), len(ids) ** 2 - (sizes**2).sum()


def freeze_unreached(model: FGCLIP, names: Collection[str]) -> None:
    """Freezes the parameters that none of the named LOSSES reaches: DDP waits for a gradient of all trainable ones."""
    captions, regions = {"long", "short"} & {*names}, {"region", "hard"} & {*names}
    attention = f"vision_model.encoder.layers.{len(model.vision_model.encoder.layers) - 1}.self_attn"
    table = "text_model.embeddings.position_embedding"
    parts = (  # the regions' path in the last block goes by the values alone
        (captions, "logit_scale", f"{attention}.q_proj", f"{attention}.k_proj"),
        ("long" in names, "text_filip_projection", f"{table}_res", f"{table}_ori"),
        (regions or "short" in names, "text_projection", table),
        (captions, "logit_bias"),
        ("region" in names, "logit_scale_finegraind", "logit_bias_region"),
        ("hard" in names, "logit_scale_hardneg"),
        (regions, "roi_projection"),
        (captions or not model.config["roi_projection"], "visual_projection"),
    )
    unreached = [f"{part}." for reached, *group in parts if not reached for part in group]
    for name, parameter in model.named_parameters():
        if f"{name}.".startswith(tuple(unreached)):
            parameter.requires_grad_(False)
