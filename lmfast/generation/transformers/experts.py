"""Which parameters of a model are those of experts, and whether these wait for the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def expert_parameters(module: nn.Module) -> list[Tensor]:
    """The matrices of all experts of a layer in one parameter: three dimensions, no convolution."""
    return [
        p
        for part in module.modules()
        if not isinstance(part, _ConvNd)
        for p in part.parameters(recurse=False)
        if p.ndim == 3
    ]


def why_experts_wait(
    implementation: str | None, dtype: torch.dtype, capability: tuple[int, int]
) -> str | None:
    """Why the host has to know how many tokens each expert of transformers gets, or None.

    Args:
        implementation: transformers' name of how experts are computed.
        dtype: of their matrices.
        capability: of the GPU. PyTorch's `grouped_mm` reads the counts on the device on Hopper
            and Blackwell's large GPUs, in bf16; elsewhere it copies them to the host.
    """
    if implementation == "batched_mm":
        return None
    if implementation != "grouped_mm":
        return f"experts computed by {implementation!r} are told by the host which tokens they get"
    if dtype != torch.bfloat16 or capability[0] not in (9, 10):
        return (
            "the products of experts wait for the host unless they are in bfloat16 on compute "
            "capability 9 or 10"
        )
    return None
