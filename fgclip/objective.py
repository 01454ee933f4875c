"""The losses of a training step with their memory banks, and the figures by which the step is watched."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

import trainkit.distributed as distributed
from fgclip.losses import PairBank, Pairs, contrast_pairs, hard_negative_loss, symmetric_loss
from fgclip.model import FGCLIP, unit
from trainkit.device import to_device

KINDS = {"long": 0, "short": 0, "region": 1, "hard": 2}  # what each loss is a mean over: a column of `pair_counts`


def pair_counts(batch: dict) -> list[int]:
    """Images, regions, and regions with hard negatives of a batch."""
    return [len(batch["sources"]), len(batch.get("region", ())), len(batch.get("hard_regions", ()))]


class Objective:
    """The losses loss_long, loss_short, loss_region and loss_hard, as far as they are in `names`, of micro-batches.

    model: FGCLIP, in DDP or not. banks: of long, short and region, those that have negatives of earlier steps.

    A step calls `begin` with its micro-batches, then the objective with each of them in turn, then asks for `figures`.
    Every loss is a mean over the pairs of the whole step: of all its micro-batches, on all ranks. So the micro-batches,
    averaged as equals, make the step of one large batch, in everything but the number of negatives.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Collection[str],
        banks: Mapping[str, PairBank] | nn.ModuleDict,
        device: torch.device | str,
    ):
        self.model, self.names, self.device = model, list(names), device
        self.banks = dict(banks.items())
        self.ranges: dict[str, Tensor] = {}  # smallest and largest logit (2,) in the step's micro-batches of this rank

    def begin(self, batches: list[dict], *, use_banks: bool = True) -> None:
        """Count what the step's micro-batches hold, over all ranks, and forget the last step's figures."""
        counts = torch.tensor([pair_counts(batch) for batch in batches], dtype=torch.float64)
        self.counts = distributed.all_reduce_sum(counts)  # (micro-batches, 3)
        totals = self.counts.sum(0)
        self.factors = torch.where(totals > 0, distributed.world_size() * len(batches) / totals, 0.0).tolist()
        self.micro_batch, self.sums, self.ranges, self.use_banks = 0, {}, {}, use_banks

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """The losses () of the next micro-batch. Afterwards its pairs are in the banks."""
        batch = to_device(batch, self.device)
        features = self.model(batch)
        losses = {}
        for name, pairs in contrast_pairs(features, batch).items():
            if name in self.names:
                losses[f"loss_{name}"] = self.factors[KINDS[name]] * self.contrast(name, pairs, self.use_banks)
        if "hard" in self.names:
            losses["loss_hard"] = self.factors[KINDS["hard"]] * self.choose(features, batch)
        self.add("", truncated=batch["truncated"])
        for name in ("image", "short", "long", "regions", "region_texts"):
            if name in features:
                self.add(f"norm_{name}", sum=features[name].detach().norm(dim=-1).sum(), count=len(features[name]))
        self.micro_batch += 1
        return losses

    def contrast(self, name: str, pairs: Pairs, use_bank: bool) -> Tensor:
        """The summed loss of these pairs, among each other and the bank; what they do without it is counted too."""
        image, text, scale, ids, labels = pairs
        bank = self.banks.get(name)
        columns = self.counts[self.micro_batch, KINDS[name]]
        if bank is None or not use_bank:
            loss, found = symmetric_loss(image, text, scale, ids=ids, reduction="sum", with_stats=True)
            inside = found
        else:
            columns = columns + len(bank)
            loss, found = symmetric_loss(image, text, scale, ids=ids, bank=bank, reduction="sum", with_stats=True)
            with torch.no_grad():
                inside = symmetric_loss(image, text, scale, ids=ids, reduction="sum", with_stats=True)[1]
        if bank is not None:
            bank.enqueue(image, text, ids, labels)
        self.add(name, **found, columns=columns * found["rows"])
        self.add(f"{name}_in_batch", **inside)
        self.add_cosines(name, image.detach(), text.detach(), scale.detach(), ids)
        return loss

    def add_cosines(self, name: str, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None) -> None:
        cosines = image @ text.T  # (N, N)
        other = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        if ids is not None:
            other &= ids[:, None] != ids
        matched = dict(matched=cosines.diagonal().sum(), pairs=len(image))
        self.add(name, **matched, unmatched=cosines[other].sum(), other_pairs=other.sum())
        if len(image):
            ends = scale * torch.stack(cosines.aminmax())
            self.ranges[name] = torch.stack(torch.stack([ends, self.ranges.get(name, ends)]).aminmax())

    def choose(self, features: dict[str, Tensor], batch: dict) -> Tensor:
        """The summed loss of each region's own phrase among its alterations."""
        loss, found = hard_negative_loss(
            unit(features["regions"])[batch["hard_regions"]],
            unit(features["hard_texts"]),
            features["scale_hard"],
            counts=batch["hard_counts"],
            ids=batch["short_ids"][batch["hard"]],
            reduction="sum",
            with_stats=True,
        )
        self.add("hard", **found)
        return loss

    def add(self, group: str, **values: Tensor | float) -> None:
        """Sum up over the micro-batches; the names are the same on every rank."""
        for name, value in values.items():
            self.sums[group, name] = self.sums.get((group, name), 0) + value

    def figures(self) -> dict[str, float]:
        """What there is to log of the step, over all micro-batches and ranks; NaN where nothing was counted. Of each of
        long, short and region, by their name:

        _relative: loss over the logarithm of a row's candidates, 1 is chance; _r1: share of rows whose own is first;
        _candidates: how many the row had, its own among them; _unmasked: how many of them count, without those of the
        same caption; _in_batch, _in_batch_relative, _in_batch_r1: loss and the others without the bank;
        _cosine and _cosine_unmatched: means of the pairs and of all others in a micro-batch of a rank;
        _bank: pairs in the bank. Of the hard negatives: hard_relative, hard_r1. norm_*: mean length of the features.
        """
        keys = list(self.sums)
        values = [torch.as_tensor(self.sums[key], dtype=torch.float64, device=self.device) for key in keys]
        total = dict(zip(keys, distributed.all_reduce_sum(torch.stack(values).cpu()).tolist(), strict=True))

        def mean(group: str, value: str, count: str) -> float:
            return total[group, value] / total[group, count] if total[group, count] else float("nan")

        found = {}
        for name in self.names:
            found[f"{name}_relative"] = mean(name, "loss_over_chance", "rows_with_negatives")
            found[f"{name}_r1"] = mean(name, "top1", "rows_with_negatives")
            if name == "hard":
                continue
            found[f"{name}_candidates"] = mean(name, "columns", "rows")
            found[f"{name}_unmasked"] = mean(name, "candidates", "rows")
            inside = f"{name}_in_batch"
            found[inside] = mean(inside, "loss", "rows")
            found[f"{inside}_relative"] = mean(inside, "loss_over_chance", "rows_with_negatives")
            found[f"{inside}_r1"] = mean(inside, "top1", "rows_with_negatives")
            found[f"{name}_cosine"] = mean(name, "matched", "pairs")
            found[f"{name}_cosine_unmatched"] = mean(name, "unmatched", "other_pairs")
            if name in self.banks:
                found[f"{name}_bank"] = len(self.banks[name])
        found |= {group: mean(group, "sum", "count") for group, value in keys if value == "count"}
        return found | {"truncated": int(total["", "truncated"])}


def freeze_unreached(model: FGCLIP, names: Collection[str]) -> None:
    """Freezes the parameters that none of the named losses (long, short, region, hard) has a path to.

    DistributedDataParallel waits for the gradient of every parameter that is trainable.
    """
    captions, regions = {"long", "short"} & {*names}, {"region", "hard"} & {*names}
    last = f"vision_model.encoder.layers.{len(model.vision_model.encoder.layers) - 1}.self_attn"
    table = "text_model.embeddings.position_embedding"
    reached = {
        "logit_scale": captions,
        "logit_scale_finegraind": "region" in names,
        "logit_scale_hardneg": "hard" in names,
        "visual_projection": captions or not model.config["roi_projection"],
        "roi_projection": regions,
        "text_projection": regions or "short" in names,
        "text_filip_projection": "long" in names,
        table: regions or "short" in names,
        f"{table}_res": "long" in names,
        f"{table}_ori": "long" in names,
        f"{last}.q_proj": captions,  # the regions' path goes by the values alone
        f"{last}.k_proj": captions,
    }
    for name, parameter in model.named_parameters():
        for part, trained in reached.items():
            if not trained and (name == part or name.startswith(part + ".")):
                parameter.requires_grad_(False)
