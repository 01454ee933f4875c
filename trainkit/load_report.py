"""What loading weights did."""

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """What a load of weights did, by name of tensor.

    source: path of the weights, or "" for a state dict.
    loaded: tensors of the model that the source filled.
    skipped: tensors of the source that were not used, with the reason.
    missing: tensors of the model that the source lacks; they keep their initial values.
    made: tensors of the model made from others, with the origin.
    notes: sentences about what was guessed or converted.
    """

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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


def summarise(names: list[str], count: int = 6) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
