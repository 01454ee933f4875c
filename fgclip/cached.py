"""The losses of a step over all of its micro-batches at once, in the memory of one (GradCache, Gao et al. 2021)."""

import torch
from torch import Tensor, nn

from fgclip.freezing import TOWERS
from fgclip.objective import FGCLIPLoss, pairs_of
from trainkit.device import at_least_float32, to_device

# What the second pass leaves out where none of these parameters learns.
INPUTS = dict(vision=("pixels",), text=("short_texts", "long_texts"))
PARTS = TOWERS | dict(vision=(*TOWERS["vision"], "roi_projection"))


class CachedFGCLIPLoss(FGCLIPLoss):
    """`FGCLIPLoss` with the negatives of all micro-batches: the step is that of one large batch.

    The first call of a step makes the features of all micro-batches without graph, the losses, and their gradients by
    the features. Each call then makes the features of its micro-batch again, with graph and the same random states, and
    gives the losses of the whole step with what is this micro-batch's of their gradients, times the number of
    micro-batches: the average over the calls has the value and the gradient of the large batch. Beside one micro-batch,
    memory holds the features and their gradients.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__(model, **options)
        learning = [name.removeprefix("module.") for name, each in model.named_parameters() if each.requires_grad]
        self.left_out = {
            key for tower, keys in INPUTS.items() for key in keys
            if not any(name.startswith(PARTS[tower]) for name in learning)
        }  # fmt: skip

    def begin(self, batches: list[dict], *, use_banks: bool = True) -> None:
        super().begin(batches, use_banks=use_banks)
        self.batches, self.states, self.place = batches, [], 0

    def count(self, batches: list[dict]) -> Tensor:
        return super().count(batches).sum(0, keepdim=True)

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """The losses () of the whole step, with the gradient that goes through the next micro-batch."""
        if self.place == 0:
            self.look_ahead()
        batch = {name: value for name, value in batch.items() if name not in self.left_out}
        with torch.random.fork_rng([self.device] if torch.device(self.device).type == "cuda" else []):
            self.set_random_state(self.states[self.place])
            features = self.model(to_device(batch, self.device))
        losses = {}
        for name, (loss, gradients) in self.cached.items():
            share = loss.new_zeros(())
            for key in (key for key in features if key in gradients):
                share = share + (gradients[key][self.place] * at_least_float32(features[key])).sum()
            losses[name] = loss + (share - share.detach())
        self.place += 1
        return losses

    def look_ahead(self) -> None:
        """The first pass: `cached`, by name of a loss, its value and its gradients by feature and micro-batch."""
        parts, pairs = [], []
        with torch.no_grad():
            for batch in self.batches:
                self.states.append(self.random_state())
                batch = to_device(batch, self.device)
                parts.append(self.model(batch))
                pairs.append(pairs_of(batch))
        torch.clear_autocast_cache()  # its copies of the weights have no graph
        features = {name: torch.cat([part[name] for part in parts]) if first.dim() else first.clone()
                    for name, first in parts[0].items()}  # fmt: skip
        features = {name: at_least_float32(feature).requires_grad_() for name, feature in features.items()}
        losses = self.losses(features, joined(pairs, [len(part.get("regions", ())) for part in parts]))
        self.cached = {}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, list(features.values()), retain_graph=True, allow_unused=True)
            gradients = {key: each for key, each in zip(features, gradients, strict=True) if each is not None}
            sizes = {key: [len(part[key]) for part in parts] for key, each in gradients.items() if each.dim()}
            shares = {
                key: (len(parts) * each).split(sizes[key]) if each.dim() else [each] * len(parts)
                for key, each in gradients.items()
            }
            self.cached[name] = loss.detach(), shares

    def random_state(self) -> list[Tensor]:
        """Of the CPU and, where the model is on one, of the GPU."""
        cuda = torch.device(self.device).type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]

    def set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for cuda in state[1:]:
            torch.cuda.set_rng_state(cuda, self.device)


def joined(pairs: list[dict], regions: list[int]) -> dict:
    """What `pairs_of` says of several batches, with so many regions each, as of one."""
    whole = {name: [part[name] for part in pairs] for name in pairs[0]}
    if "hard_regions" in whole:
        firsts = [sum(regions[:i]) for i in range(len(regions))]
        whole["hard_regions"] = [rows + first for rows, first in zip(whole["hard_regions"], firsts, strict=True)]
    return {name: sum(parts) if name == "truncated" else torch.cat(parts) for name, parts in whole.items()}
