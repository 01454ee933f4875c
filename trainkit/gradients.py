"""How much each loss pulls at a part of the network, and whether the losses pull the same way."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainkit import distributed


@dataclass(frozen=True)
class GradientReport:
    """Of each part's gradient, what each loss adds to it, weight included, averaged over the ranks as DDP does.

    norms: part -> loss -> 2-norm over the part's trainable parameters; None where the loss has no path to any of them.
    cosines: part -> (loss, other loss), each pair once -> cosine of the angle between the two gradients, below 0 where
        they work against each other; None where either gradient is None, exactly 0 or not finite.
    """

    norms: dict[str, dict[str, float | None]]
    cosines: dict[str, dict[tuple[str, str], float | None]]

    def record(self) -> dict:
        """Plain nested dicts for metrics.jsonl: part -> "norm" -> loss, and part -> "cosine" -> loss -> other loss."""
        record = {part: {"norm": dict(norms), "cosine": {}} for part, norms in self.norms.items()}
        for part, cosines in self.cosines.items():
            for (one, other), value in cosines.items():
                record[part]["cosine"].setdefault(one, {})[other] = value
        return record

    def text(self) -> str:
        """A table a part: its losses, their norms, and their cosines with the losses above."""
        lines = []
        for part, norms in self.norms.items():
            width = max(len(part), *map(len, norms))
            titles = [f"{name:>{max(len(name), 6)}}" for name in [*norms][:-1]]
            lines.append("  ".join([f"gradient at {part:<{width}}", f"{'norm':>9}", *titles]))
            for i, (name, norm) in enumerate(norms.items()):
                cosines = [self.cosines[part][other, name] for other in [*norms][:i]]
                cells = ["-" if value is None else f"{value:+.3f}" for value in cosines]
                cells = [f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=False)]
                cells = ["none" if norm is None else f"{norm:.3g}", *cells]
                lines.append("  ".join([f"{'':<12}{name:<{width}}", f"{cells[0]:>9}", *cells[1:]]))
        return "\n".join(lines)


def gradient_report(
    losses: dict[str, Tensor], weights: dict[str, float], parts: dict[str, nn.Module]
) -> GradientReport:
    """The report of one forward's losses, before their backward: the graph is kept, no `.grad` is read or written.

    losses: unweighted scalars (); those without a weight other than 0 are left out. parts: by name, what to look at.
    A collective: every rank calls it with the same names. Raises ValueError where no loss has a weight. A training loop
    calls its `TrainStep` with `parts` instead, which sees to the gradient scaler and the micro-batches.
    """
    weighted = {name: weights[name] * loss for name, loss in losses.items() if weights.get(name)}
    if not weighted:
        raise ValueError(f"none of the losses {sorted(losses)} has a weight other than 0.")
    gradients = LossGradients(parts)
    gradients.add(weighted)
    return gradients.report()


class LossGradients:
    """Adds up each loss's gradient at the parts over the micro-batches of a step; `report` says what came together.

    Holds the parts' trainable parameters once for every loss, in float32 at least.
    """

    def __init__(self, parts: dict[str, nn.Module]):
        self._parameters = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        self._sums: dict[str, dict[str, Tensor]] = {part: {} for part in parts}  # part -> loss -> (parameters,)
        self._connected: set[tuple[str, str]] = set()  # part, loss

    def add(self, losses: dict[str, Tensor]) -> None:
        """Differentiate a micro-batch's weighted losses (); one without a graph has no path to any part."""
        for name, loss in losses.items():
            # To all leaves, as backward does: a rank that left out what leads to none of the parts would leave out
            # collectives on the way, and the other ranks would wait for it.
            leaves = _leaves(loss)
            found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) if leaves else ()
            gradients = {
                id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None
            }
            for part, parameters in self._parameters.items():
                if any(id(parameter) in gradients for parameter in parameters):
                    self._connected.add((part, name))
                flat = [gradients.get(id(parameter), torch.zeros_like(parameter)) for parameter in parameters]
                flat = torch.cat([loss.new_empty(0, dtype=torch.float32), *(gradient.flatten() for gradient in flat)])
                self._sums[part][name] = self._sums[part].get(name, 0) + flat

    def report(self, *, scale: float = 1.0) -> GradientReport:
        """What was added, the losses having been multiplied by `scale` (a gradient scaler's). A collective."""
        norms, cosines = {}, {}
        for part, sums in self._sums.items():
            names = list(sums)
            rows = distributed.all_reduce_sum(torch.stack(list(sums.values()))) / distributed.world_size()
            connected = torch.tensor([(part, name) in self._connected for name in names])
            connected = distributed.all_reduce_sum(connected.int()).tolist()
            length = torch.linalg.vector_norm(rows, dim=1)  # (losses,)
            rows /= length[:, None]
            cosine = (rows @ rows.T).clamp(-1, 1).tolist()
            length = (length / scale).tolist()
            usable = [0 < norm < math.inf for norm in length]
            norms[part] = {name: length[i] if connected[i] else None for i, name in enumerate(names)}
            cosines[part] = {
                (names[i], names[j]): cosine[i][j] if usable[i] and usable[j] else None
                for i, j in itertools.combinations(range(len(names)), 2)
            }
        return GradientReport(norms, cosines)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every leaf that backward from `loss` would reach."""
    leaves, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
