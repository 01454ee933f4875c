"""Which parts of a model move while it trains."""

import torch
from torch import nn


class ParameterDrift:
    """Remembers a model's trainable parameters, in as much memory as they take, to tell how far they moved since."""

    def __init__(self, model: nn.Module):
        self.model, self.before = model, {}
        self.since()

    @torch.no_grad()
    def since(self) -> dict[str, tuple[float, int, int]]:
        """Per module two names deep: length of its move / its length, parameter tensors that moved, and all of them.

        Counted since the last call, or since the start.
        """
        before, self.before = self.before, {}
        rows: dict[str, list[tuple[float, float, bool]]] = {}
        for name, parameter in self.model.named_parameters():
            if name in before:
                move, length = (parameter - before[name]).norm().item(), before[name].norm().item()
                module = ".".join(name.split(".")[:-1][:2]) or name
                rows.setdefault(module, []).append((move**2, length**2, move > 0))
            if parameter.requires_grad:
                self.before[name] = parameter.clone()
        sums = {module: [sum(column) for column in zip(*row, strict=True)] for module, row in rows.items()}
        return {
            module: ((moves / max(lengths, 1e-30)) ** 0.5, moved, len(rows[module]))
            for module, (moves, lengths, moved) in sums.items()
        }
