"""How much each loss pulls at a part of the network, and whether the losses pull the same way."""

import itertools
import math

import torch
from torch import Tensor, nn

from trainkit import distributed
from trainkit.tables import aligned


class LossGradients:
    """Sums of each loss's gradient at the parts (float32 at least, one copy per loss) over a step's micro-batches."""

    def __init__(self, parts: dict[str, nn.Module]):
        self._parameters = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        self._sums: dict[str, dict[str, Tensor]] = {part: {} for part in parts}  # part -> loss -> (parameters,)
        self._connected: set[tuple[str, str]] = set()  # part, loss

    def add(self, losses: dict[str, Tensor]) -> None:
        """Differentiate a micro-batch's weighted losses (), before their backward: the graph is kept."""
        for name, loss in losses.items():
            # To all leaves: skipping some would skip collectives in backward, for which the other ranks would wait.
            leaves = _leaves(loss)
            grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) if leaves else ()
            gradients = {id(leaf): grad for leaf, grad in zip(leaves, grads, strict=True) if grad is not None}
            for part, parameters in self._parameters.items():
                if any(id(parameter) in gradients for parameter in parameters):
                    self._connected.add((part, name))
                flat = [gradients.get(id(parameter), torch.zeros_like(parameter)) for parameter in parameters]
                flat = torch.cat([loss.new_empty(0, dtype=torch.float32), *(gradient.flatten() for gradient in flat)])
                self._sums[part][name] = self._sums[part].get(name, 0) + flat

    def report(self, *, scale: float = 1.0) -> dict[str, dict[str, dict]]:
        """What each loss adds to each part's gradient, averaged over the ranks as DDP does. A collective.

        part -> "norm" -> loss -> 2-norm over the part's trainable parameters; None where the loss has no path to them.
        part -> "cosine" -> loss -> each later loss -> cosine between the two gradients; None where either gradient is
        None, exactly 0 or not finite.

        scale: the factor of the gradient scaler on the losses.
        """
        report = {}
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
            norms = {name: length[i] if connected[i] else None for i, name in enumerate(names)}
            cosines = {name: {} for name in names[:-1]}
            for i, j in itertools.combinations(range(len(names)), 2):
                cosines[names[i]][names[j]] = cosine[i][j] if usable[i] and usable[j] else None
            report[part] = {"norm": norms, "cosine": cosines}
        return report


def gradient_tables(report: dict[str, dict[str, dict]]) -> str:
    """A table per part: its losses, their norms, and their cosines with the losses above."""
    tables = []
    for part, record in report.items():
        names = list(record["norm"])
        rows = [[f"gradient at {part}", "norm", *names[:-1]]]
        for i, (name, norm) in enumerate(record["norm"].items()):
            cosines = [record["cosine"][other][name] for other in names[:i]]
            cells = ["-" if value is None else f"{value:+.3f}" for value in cosines]
            cells += [""] * (len(names) - 1 - i)
            rows.append([f"    {name}", "none" if norm is None else f"{norm:.3g}", *cells])
        tables.append(aligned(rows))
    return "\n".join(tables)


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
