"""What a patch did, module by module."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module: what replaced its forward, or why nothing did.

    Attributes:
        name: its name in the model, "" for the model itself.
        kind: its class.
        replaced_by: what runs instead, or None.
        reason: why nothing does, or what changes beside speed; may be empty.
    """

    name: str
    kind: str
    replaced_by: str | None
    reason: str = ""


@dataclass
class PatchReport:
    """What `lmfast.patch` did to a model.

    Attributes:
        model: the model's class.
        entries: one per module, in the order of `named_modules`.
        notes: what concerns the model as a whole.

    Example:
        >>> import lmfast, torch
        >>> report = lmfast.patch(torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Dropout()))
        >>> [(e.name, e.replaced_by) for e in report.replaced]
        [('0', 'lmfast.ops.rms_norm')]
    """

    model: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        """The modules that run something else now."""
        return [e for e in self.entries if e.replaced_by is not None]

    @property
    def kept(self) -> list[Entry]:
        """The modules left as they were."""
        return [e for e in self.entries if e.replaced_by is None]

    def __str__(self) -> str:
        lines = [
            f"lmfast.patch({self.model}): {len(self.replaced)} of {len(self.entries)} modules "
            "replaced"
        ]
        lines += [f"  {note}" for note in self.notes]
        for title, entries in (("replaced", self.replaced), ("left as they are", self.kept)):
            groups: dict[tuple[str, str], list[str]] = {}
            for e in entries:
                text = e.replaced_by or e.reason
                if e.replaced_by and e.reason:
                    text = f"{text}; {e.reason}"
                groups.setdefault((e.kind, text), []).append(e.name or "(model)")
            if groups:
                lines.append(f"  {title}:")
            width = max((len(kind) for kind, _ in groups), default=0)
            for (kind, text), names in groups.items():
                where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
                lines.append(f"    {len(names):>4} x {kind:<{width}}  {text}  [{where}]")
        return "\n".join(lines)
