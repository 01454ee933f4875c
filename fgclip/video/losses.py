"""Losses of videos: of a label per video, none per frame, and of captions and tracks. Means are over all ranks."""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgclip.losses import PairBank, hard_negative_loss, symmetric_loss
from trainkit.device import to_device
from trainkit.distributed import global_mean

LOSSES = ("bag", "class", "texts", "smooth", "caption", "track", "hard")


def top_mean(values: Tensor, mask: Tensor, share: float = 1 / 16) -> Tensor:
    """The mean of the highest floor(T * share) + 1 of each video's T values.

    values: (B, T) or (B, T, C). mask: (B, T) bool, which there are. -> (B,) or (B, C).
    """
    counts = (mask.sum(1) * share).long() + 1  # (B,)
    shape = (len(mask), -1) + (1,) * (values.ndim - 2)
    ranked = values.masked_fill(~mask.view(shape), -torch.inf).sort(dim=1, descending=True).values
    kept = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    return ranked.masked_fill(~kept.view(shape), 0).sum(1) / counts.view(shape[:1] + shape[2:])


def bag_loss(anomaly: Tensor, mask: Tensor, labels: Tensor, share: float = 1 / 16) -> Tensor:
    """Cross-entropy of a video's label and the mean probability of its highest clips (VadCLIP, Wu et al. 2024).

    anomaly: (B, T) logits. mask: (B, T) bool. labels: (B,), 1 where the video has an event.
    """
    probability = top_mean(anomaly.float().sigmoid(), mask, share).clamp(1e-6, 1 - 1e-6)
    losses = F.binary_cross_entropy(probability, labels.float(), reduction="sum")
    return global_mean(losses, len(labels))


def class_loss(classes: Tensor, mask: Tensor, targets: Tensor, share: float = 1 / 16) -> Tensor:
    """Cross-entropy of a video's classes and the mean logits of its highest clips (VadCLIP's MIL-Align).

    classes: (B, T, 1 + C) logits. targets: (B, 1 + C), rows that sum to 1; column 0 is the video without an event.
    """
    return global_mean(F.cross_entropy(top_mean(classes, mask, share), targets, reduction="sum"), len(targets))


def text_separation(texts: Tensor) -> Tensor:
    """Mean |cosine| of the text of no event, row 0, and those of the events (VadCLIP)."""
    return (texts[1:] @ texts[0]).abs().mean()


def smoothness(anomaly: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of neighbouring clips' probabilities (Sultani et al. 2018, there a sum)."""
    pairs, probability = mask[:, 1:] & mask[:, :-1], anomaly.float().sigmoid()
    squares = (probability[:, 1:] - probability[:, :-1]).square() * pairs
    return global_mean(squares.sum(), pairs.sum())


class VideoLoss:
    """The losses loss_* of the head, named as in LOSSES, and metrics.

    names: those that are computed. banks: negatives for "track" and "caption" from earlier steps.
    texts, ids: unit vectors (U, D) and `caption_ids` (U,) of what captions and tracks say.
    top_share: of a video's clips that its label is about.
    """

    def __init__(
        self, names: Collection[str], *, banks: Mapping[str, PairBank], texts: Tensor, ids: Tensor, top_share: float,
        device,
    ):  # fmt: skip
        self.names, self.banks, self.texts, self.ids = set(names), dict(banks.items()), texts, ids
        self.top_share, self.device, self.use_banks = top_share, device, True

    def __call__(self, model: nn.Module, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of a batch of `collate_bags`; captions and tracks are stretches of clips against their texts.

        Metrics of "track" and "caption": _r1, hits among what the loss sees; _in_batch, the loss without the bank;
        _bank, the pairs in it, and _bank_events, those of events where it has two classes.
        """
        batch = to_device(batch, self.device)
        output, mask, metrics = model(batch), batch["mask"], {}
        losses = {
            "bag": bag_loss(output["anomaly"], mask, 1 - batch["targets"][:, 0], self.top_share),
            "class": class_loss(output["classes"], mask, batch["targets"], self.top_share),
            "texts": text_separation(output["texts"]), "smooth": smoothness(output["anomaly"], mask),
        }  # fmt: skip
        for kind, name in enumerate(("caption", "track")):
            if name in self.names:
                of = batch["kinds"] == kind
                pairs = output["spans"][of], self.texts[batch["texts"][of]], output["scale"]
                losses[name] = self.contrast(name, *pairs, self.ids[batch["texts"][of]], batch["labels"][of], metrics)
        if "hard" in self.names:
            losses["hard"] = hard_negative_loss(
                output["spans"][batch["hard_rows"]], self.texts[batch["hard"]], output["scale"],
                counts=batch["hard_counts"], ids=self.ids[batch["hard"]],
            )  # fmt: skip
        return {f"loss_{name}": losses[name] for name in LOSSES if name in self.names}, metrics

    def contrast(
        self, name: str, spans: Tensor, texts: Tensor, scale: Tensor, ids: Tensor, labels: Tensor, metrics: dict
    ) -> Tensor:
        """The loss () of unit vectors (N, D) and their texts (N, D), among each other and the bank."""
        bank = self.banks.get(name)
        used = bank if self.use_banks else None
        loss, stats = symmetric_loss(spans, texts, scale, ids=ids, bank=used, with_stats=True)
        metrics[f"{name}_r1"] = stats["top1"] / stats["rows_with_negatives"].clamp(min=1)
        if bank is not None:
            with torch.no_grad():
                metrics[f"{name}_in_batch"] = symmetric_loss(spans, texts, scale, ids=ids)
            bank.enqueue(spans, texts, ids, labels)
            metrics[f"{name}_bank"] = torch.tensor(len(bank), device=self.device)
            metrics[f"{name}_bank_events"] = torch.tensor(len(bank.images[-1]), device=self.device)
        return loss
