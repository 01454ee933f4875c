"""The losses of a step over all of its micro-batches at once, in the memory of one (GradCache, Gao et al. 2021)."""

import torch
from torch import Tensor, nn

from fgclip.freezing import TOWERS
from fgclip.objective import FGCLIPLoss, pairs_of
from trainkit.device import at_least_float32, to_device

# By input, the parts that it goes through. The second pass leaves it out where none of them learns.
INPUTS = dict.fromkeys(("short_texts", "long_texts"), TOWERS["text"])
INPUTS |= dict(pixels=(*TOWERS["vision"], "roi_projection"))


class CachedFGCLIPLoss(FGCLIPLoss):
    """`FGCLIPLoss` with the negatives of all micro-batches: the step is that of one large batch.

    The first call of a step makes all features without graph, the losses, and their gradients by the features. Each
    call makes its micro-batch's features again, with graph and the same random states, and gives the losses of the step
    with its own part of the gradient, times the number of calls: their average is that of the large batch.
    """

    at_once = True

    def __init__(self, model: nn.Module, **options):
        super().__init__(model, **options)
        learning = [name.removeprefix("module.") for name, each in model.named_parameters() if each.requires_grad]
        self.left_out = {key for key, parts in INPUTS.items() if not any(name.startswith(parts) for name in learning)}
        self.gpus = [self.device] if torch.device(self.device).type == "cuda" else []

    def begin(self, batches: list[dict], *, use_banks: bool = True) -> None:
        super().begin(batches, use_banks=use_banks)
        self.batches, self.states, self.place = batches, [], 0

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """The losses () of the whole step, with the gradient that goes through the next micro-batch."""
        if self.place == 0:
            self.look_ahead()
        batch = {name: value for name, value in batch.items() if name not in self.left_out}
        with torch.random.fork_rng(self.gpus):
            torch.set_rng_state(self.states[self.place][0])
            for gpu, state in zip(self.gpus, self.states[self.place][1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            features = self.model(to_device(batch, self.device))
        losses = {}
        for name, (loss, gradients) in self.cached.items():
            parts = ((gradients[key][self.place], features[key]) for key in features if key in gradients)
            share = sum((gradient * at_least_float32(feature)).sum() for gradient, feature in parts)
            losses[name] = loss + (share - share.detach())
        self.place += 1
        return losses

    def look_ahead(self) -> None:
        """The first pass: `cached`, by name of a loss, its value and its gradients by feature and micro-batch."""
        parts, pairs = [], []
        with torch.no_grad():
            for batch in self.batches:
                self.states.append([torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self.gpus)])
                batch = to_device(batch, self.device)
                parts.append(self.model(batch))
                pairs.append(pairs_of(batch))
        features = {name: torch.cat([part[name] for part in parts]) if first.dim() else first.clone()
                    for name, first in parts[0].items()}  # fmt: skip
        features = {name: at_least_float32(feature).requires_grad_() for name, feature in features.items()}
        losses = self.losses(features, joined(pairs, [len(part.get("regions", ())) for part in parts]))
        self.cached, count = {}, len(parts)
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, list(features.values()), retain_graph=True, allow_unused=True)
            self.cached[name] = loss.detach(), {
                key: (count * each).split([len(part[key]) for part in parts]) if each.dim() else [each] * count
                for key, each in zip(features, gradients, strict=True) if each is not None
            }  # fmt: skip


def joined(pairs: list[dict], regions: list[int]) -> dict:
    """What `pairs_of` says of several batches, with so many regions each, as of one."""
    whole = {name: [part[name] for part in pairs] for name in pairs[0]}
    if "hard_regions" in whole:
        whole["hard_regions"] = [rows + sum(regions[:i]) for i, rows in enumerate(whole["hard_regions"])]
    return {name: sum(parts) if name == "truncated" else torch.cat(parts) for name, parts in whole.items()}
