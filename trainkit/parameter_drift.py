"""Which parts of a model move while it trains."""

import torch
from torch import nn


class ParameterDrift:
    """Remembers a model's trainable parameters, in as much memory as they take, to tell how far they moved since."""

    def __init__(self, model: nn.Module, depth: int = 2):
        self.model, self.depth = model, depth
        self._remember()

    def _remember(self) -> None:
        parameters = self.model.named_parameters()
        self.before = {name: parameter.detach().clone() for name, parameter in parameters if parameter.requires_grad}

    @torch.no_grad()
    def since(self) -> dict[str, tuple[float, int, int]]:
        """Of every module `depth` names deep: length of its move over its own, parameters that moved, and all of them.

        Counted since the last call, or since the start. A parameter is a tensor with a name of its own.
        """
        parts: dict[str, list[tuple[float, float, bool]]] = {}
        for name, parameter in self.model.named_parameters():
            if name in self.before:
                before = self.before[name]
                move = (parameter - before).norm().item()
                module = ".".join(name.split(".")[:-1][: self.depth]) or name
                parts.setdefault(module, []).append((move**2, before.norm().item() ** 2, move > 0))
        self._remember()
        found = {}
        for module, rows in parts.items():
            moves, lengths, moved = zip(*rows, strict=True)
            relative = (sum(moves) / max(sum(lengths), 1e-30)) ** 0.5
            found[module] = (relative, sum(moved), len(moved))
        return found
