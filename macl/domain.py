"""Domain alignment: features that do not show which modality or data set they come from."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainkit.distributed as distributed
from macl.boxes import Size
from trainkit.device import at_least_float32

MMD_LEVELS = ("none", "embedding", "pyramid")
ADVERSARIES = ("none", "modality", "dataset")
FACTORS = (0.5, 1.0, 2.0)  # of the median distance: the bandwidths of the median heuristic


def mmd(x: Tensor, y: Tensor, sigmas: list[float] | Tensor, unbiased: bool = True, paired: bool = False) -> Tensor:
    """Squared maximum mean discrepancy between two samples (Gretton et al., JMLR 2012).

    x: (N, D). y: (M, D).
    sigmas: bandwidths in the units of x; the kernel is the mean of exp(-|a - b|^2 / (2 sigma^2)) over them.
    unbiased: MMD_u^2 (equation 3), which may be negative; else MMD_b^2 (equation 5).
    paired: whether x_i and y_i are of one thing. These pairs are then left out of the cross term (equation 4), which
        would be too large by what they have in common. Unbiased and N = M only, else ValueError.

    -> (), float32 at least; exactly 0 but connected with fewer than two rows (biased: one) on either side.
    """
    if paired and (len(x) != len(y) or not unbiased):
        raise ValueError(f"the paired form is unbiased and of equally many rows, got {len(x)} and {len(y)}")
    x, y = at_least_float32(x), at_least_float32(y)
    if min(len(x), len(y)) < (2 if unbiased else 1):
        return (x.sum() + y.sum()) * 0
    scales = 2 * torch.as_tensor(sigmas, dtype=x.dtype, device=x.device).square()

    def mean_kernel(a: Tensor, b: Tensor, *, without_diagonal: bool) -> Tensor:
        squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        kernel = sum((-squared / scale).exp() for scale in scales) / len(scales)  # (len(a), len(b))
        if not without_diagonal:
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))

    within = mean_kernel(x, x, without_diagonal=unbiased) + mean_kernel(y, y, without_diagonal=unbiased)
    return within - 2 * mean_kernel(x, y, without_diagonal=paired)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return -ctx.scale * gradient, None


def gradient_reversal(x: Tensor, scale: float) -> Tensor:
    """x as it is; its gradient times -scale (Ganin et al., JMLR 2016, section 4.2). x: any shape."""
    return _Reverse.apply(x, scale)


def grl_schedule(progress: float) -> float:
    """Scale of the reversed gradient (Ganin et al., 2016, section 5.2): 0 at progress 0, 0.9999 at progress 1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class DomainClassifier(nn.Module):
    """Classifier of domains behind a gradient reversal, which makes the features lose what it uses."""

    def __init__(self, in_dim: int, hidden: int = 128, domains: int = 2, dropout: float = 0.5):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, domains))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x: (N, in_dim), or (N, in_dim, H, W) to be averaged. scale: of the reversed gradient. -> (N, domains)."""
        if x.dim() == 4:
            x = x.mean(dim=(2, 3))
        return self.fc(gradient_reversal(x, scale))


class DomainAlignment(nn.Module):
    """The alignment losses of the detector.

    mmd_level: MMD of "embedding", the contrastive ones; "pyramid", pooled pyramids of length 1; or "none".
    mmd_sigmas: bandwidths; None for FACTORS times the median distance of the rows compared.
    mmd_unbiased: see `mmd`; modalities are compared in its paired form.
    adversary: what a `DomainClassifier` of pooled pyramids predicts, "modality", "dataset", or "none".
    domains: number of data sets. With several, MMD compares these too, within each modality.
    pooled_dim: length of a row of `pool`.
    """

    def __init__(
        self, *, mmd_level: str, mmd_sigmas: tuple[float, ...] | None, mmd_unbiased: bool, adversary: str,
        domains: int, pooled_dim: int,
    ):  # fmt: skip
        super().__init__()
        if mmd_sigmas is not None and (not mmd_sigmas or min(mmd_sigmas) <= 0):
            raise ValueError(f"mmd_sigmas {list(mmd_sigmas)}: expected bandwidths above 0, or None")
        if adversary == "dataset" and domains < 2:
            raise ValueError(f"adversary 'dataset' with domains={domains}: it tells two data sets apart at least")
        self.mmd_level, self.mmd_sigmas, self.mmd_unbiased = mmd_level, mmd_sigmas, mmd_unbiased
        self.adversary, self.domains = adversary, domains
        self.classifier = None
        if adversary != "none":
            self.classifier = DomainClassifier(pooled_dim, domains=domains if adversary == "dataset" else 2)

    def forward(
        self, features: list, image_domains: Tensor, embedded: dict | None, row_domains: Tensor, reversal_scale: float
    ) -> tuple[dict, dict]:
        """Losses and metrics of `mmd_loss` and `adversarial_loss`, where enabled.

        features: `Features` of the detector.
        image_domains: (B,) int64, data set per image; ValueError for one beyond `domains`.
        embedded: modality -> (N, D), for mmd_level "embedding".
        row_domains: (N,) int64, data set per row of `embedded`.
        reversal_scale: of the classifier's reversed gradient.
        """
        if self.domains > 1 and (last := int(image_domains.max())) >= self.domains:
            raise ValueError(f"a target's domain is {last}; expected less than domains={self.domains}")
        if self.mmd_level == "pyramid" or self.classifier is not None:
            pooled = {
                name: torch.cat([pool(group.pyramids[name], group.sizes, group.batch_size) for group in features])
                for name in features[0].pyramids
            }
        losses, metrics = {}, {}
        if self.mmd_level == "embedding":
            losses, metrics = self.mmd_loss(embedded, row_domains)
        if self.mmd_level == "pyramid":
            rows = {name: F.normalize(x, dim=1) for name, x in pooled.items()}
            losses, metrics = self.mmd_loss(rows, image_domains)
        if self.classifier is not None:
            more, about = self.adversarial_loss(pooled, image_domains, reversal_scale)
            losses, metrics = losses | more, metrics | about
        return losses, metrics

    def mmd_loss(self, features: dict[str, Tensor], domains: Tensor) -> tuple[dict, dict]:
        """MMD between the modalities, and between the data sets, over the rows of all processes.

        features: modality -> (N, D) of this process; row i of both is from the same thing.
        domains: (N,) int64, data set per row.
        -> loss_mmd; with several data sets loss_mmd_domains, a mean over modalities and pairs of data sets of at least
        two rows each; the metrics mmd_bandwidth and mmd_rows.
        """
        features = {name: distributed.all_gather_with_grad(at_least_float32(rows)) for name, rows in features.items()}
        modalities = features["visible"], features["infrared"]
        sigmas = self.bandwidths(*modalities)
        losses = {"loss_mmd": mmd(*modalities, sigmas, unbiased=self.mmd_unbiased, paired=self.mmd_unbiased)}
        if self.domains > 1:
            domains = distributed.gather(domains)
            pairs = [
                (rows[domains == one], rows[domains == other])
                for one, other in itertools.combinations(range(self.domains), 2)
                for rows in features.values()
            ]
            several = [pair for pair in pairs if min(map(len, pair)) > 1] or pairs[:1]
            terms = [mmd(*pair, self.bandwidths(*pair), unbiased=self.mmd_unbiased) for pair in several]
            losses["loss_mmd_domains"] = torch.stack(terms).mean()
        return losses, {"mmd_bandwidth": sigmas.median(), "mmd_rows": sigmas.new_tensor(float(len(modalities[0])))}

    def bandwidths(self, x: Tensor, y: Tensor) -> Tensor:
        """`mmd_sigmas`, or those of the median heuristic (Gretton et al., 2012, section 8), without gradient."""
        if self.mmd_sigmas is not None:
            return x.new_tensor(self.mmd_sigmas)
        distances = F.pdist(torch.cat([x, y]).detach())
        middle = distances.median() if len(distances) else distances.sum()
        return middle.clamp(min=1e-4) * x.new_tensor(FACTORS)  # rows that all are the same have distance 0

    def adversarial_loss(self, pooled: dict[str, Tensor], domains: Tensor, scale: float) -> tuple[dict, dict]:
        """Cross-entropy of the classifier over the rows of all processes, and its accuracy.

        pooled: modality -> (B, pooled_dim). domains: (B,) int64, data set per image. scale: of the reversed gradient.
        """
        rows = torch.cat(list(pooled.values()))
        labels = domains.repeat(len(pooled))
        if self.adversary == "modality":
            labels = torch.arange(len(pooled), device=rows.device).repeat_interleave(len(domains))
        logits = at_least_float32(self.classifier(rows, scale))
        loss = distributed.global_mean(F.cross_entropy(logits, labels, reduction="sum"), len(rows))
        right = (logits.argmax(dim=1) == labels).sum()
        right, count = distributed.all_reduce_sum(torch.stack([right, torch.full_like(right, len(rows))]))
        return {"loss_adversary": loss}, {"adversary_accuracy": right / count}


def pool(pyramid: list[Tensor], sizes: list[Size], batch_size: Size) -> Tensor:
    """Mean of every map over the part that an image covers: (B, levels * C). Padding would show the data set's sizes.

    pyramid: (B, C, H_l, W_l). sizes, batch_size: of the images without and with padding.
    """
    rows = []
    for i, (height, width) in enumerate(sizes):
        means = []
        for level in pyramid:
            bottom = math.ceil(height / batch_size[0] * level.shape[2])
            right = math.ceil(width / batch_size[1] * level.shape[3])
            means.append(level[i, :, :bottom, :right].mean(dim=(1, 2)))
        rows.append(torch.cat(means))
    return torch.stack(rows)
