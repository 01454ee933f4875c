"""What loading weights did."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """What a load of weights did, by name of tensor."""

    source: str = ""  # path of the weights, or "" for a state dict
    loaded: list[str] = field(default_factory=list)  # tensors of the model that the source filled
    skipped: dict[str, str] = field(default_factory=dict)  # unused tensors of the source, with the reason
    missing: list[str] = field(default_factory=list)  # tensors of the model that keep their initial values
    made: dict[str, str] = field(default_factory=dict)  # tensors of the model made from others, with the origin
    notes: list[str] = field(default_factory=list)  # sentences about what was guessed or converted

    def __str__(self) -> str:
        counts = f"loaded {len(self.loaded)} tensors, skipped {len(self.skipped)}"
        lines = [f"{self.source}: {counts}" if self.source else counts]
        if self.missing:
            lines[0] += f", left {len(self.missing)} as initialised"
            lines.append(f"  as initialised: {summarise(self.missing)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  skipped, {reason}: {summarise(names)}" for reason, names in reasons.items()]
        lines += [f"  {name} made from {origin}" for name, origin in self.made.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def summarise(names: Sequence[str], count: int = 6) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
