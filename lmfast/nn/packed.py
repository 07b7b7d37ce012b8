"""Parameters that are stored packed and saved one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfast.nn.projection import Projections


class PackedParameters(Projections):
    """A module that keeps several matrices side by side in one parameter.

    One matrix product then serves them all. State dicts hold the parts under their own names, as
    views of the packed parameter; loading takes the parts, bit for bit, or the packed parameter.

    A subclass says what is packed, in `parts`.
    """

    def parts(self) -> dict[str, list[tuple[str, int]]]:
        """Return packed parameter -> (name of a part, its size in the last dimension), in order."""
        raise NotImplementedError

    def part_views(self, name: str, packed: Tensor) -> list[tuple[str, Tensor]]:
        """Return (name, view) of every part of the packed parameter `name` or its like."""
        parts = self.parts()[name]
        views = packed.split([size for _, size in parts], dim=-1)
        return [(part, view) for (part, _), view in zip(parts, views)]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self.parts()
        for name in self._parameters:
            if prefix + name not in destination:
                continue
            value = destination.pop(prefix + name)  # and in again, so that the order stays
            if name not in packed:
                destination[prefix + name] = value
                continue
            for part, view in self.part_views(name, value):
                destination[prefix + part] = view

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        absent: dict[str, list[str]] = {}
        for name in self.parts():
            own = getattr(self, name)
            if own is None:
                continue
            views = [(prefix + part, view) for part, view in self.part_views(name, own)]
            found = {part: state_dict.pop(part) for part, _ in views if part in state_dict}
            wrong = [(part, view) for part, view in views if part in found]
            wrong = [(part, view) for part, view in wrong if found[part].shape != view.shape]
            for part, view in wrong:
                error_msgs.append(
                    f"{part} must have shape {tuple(view.shape)}, "
                    f"the state dict has {tuple(found[part].shape)}"
                )
            absent[prefix + name] = [part for part, _ in views if part not in found]
            if not wrong and not absent[prefix + name]:
                state_dict[prefix + name] = torch.cat([found[part] for part, _ in views], dim=-1)
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        for key in missing:  # named as the file should have named them
            missing_keys.extend(absent.get(key, [key]))
