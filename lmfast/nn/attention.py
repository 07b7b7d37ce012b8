"""Multi-head attention with one packed projection for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmfast.nn.attend import attend
from lmfast.nn.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from lmfast.generation.cache import LayerCache


class MultiHeadAttention(nn.Module):
    """Causal multi-head or grouped-query self-attention with rotary positions.

        head_h = softmax(rope(x W_Q) rope(x W_K)^T / sqrt(D) + mask) x W_V;   y = [head_0 ..] W_O

    Args:
        emb_dim: model width E.
        num_heads: number H of query heads.
        num_kv_heads: number Hkv of key/value heads, H by default; query head h reads key/value head
            h // (H / Hkv).
        head_dim: head size D, E / H by default.
        rope_base, rope_interleaved, rope_scaling: as in `RotaryEmbedding`.

    The parameters are `W_QKV` (E, (H + 2 Hkv) D), whose columns are all query heads, then all key
    heads, then all value heads, and `W_O` (H D, E). State dicts use the layout of one matrix per
    head, `heads.{h}.W_Q`, `heads.{h}.W_K`, `heads.{h}.W_V` (E, D) and `W_O`: they are saved as
    views of the packed matrix and loaded bit for bit; a packed `W_QKV` loads as well.

    Raises:
        ValueError: a size is not positive, E is no multiple of H and `head_dim` is not given, or H
            is no multiple of Hkv.

    Backends: those of `lmfast.ops.rope` and `lmfast.ops.attention`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023 (groups), arXiv:2305.13245.

    Example:
        >>> import torch
        >>> attention = MultiHeadAttention(32, 4)
        >>> attention(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        emb_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if emb_dim < 1 or num_heads < 1 or num_kv_heads < 1:
            raise ValueError(
                "emb_dim, num_heads and num_kv_heads must be at least 1, got "
                f"{emb_dim}, {num_heads} and {num_kv_heads}"
            )
        if head_dim is None:
            if emb_dim % num_heads:
                raise ValueError(
                    f"emb_dim {emb_dim} must be a multiple of num_heads {num_heads}, "
                    "or head_dim must be given"
                )
            head_dim = emb_dim // num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}"
            )
        self.emb_dim = emb_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.W_QKV = nn.Parameter(torch.empty(emb_dim, (num_heads + 2 * num_kv_heads) * head_dim))
        self.W_O = nn.Parameter(torch.empty(num_heads * head_dim, emb_dim))
        self.rope = RotaryEmbedding(
            head_dim, rope_base, interleaved=rope_interleaved, scaling=rope_scaling
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, each head's matrix by its own fan-in and fan-out (E, D)."""
        with torch.no_grad():
            for _, columns in self._head_columns(self.W_QKV):
                nn.init.xavier_uniform_(columns)
        nn.init.xavier_uniform_(self.W_O)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        positions: int | Tensor | None = None,
    ) -> Tensor:
        """Attend from every position of x to itself and what precedes it.

        Args:
            x: (B, T, E).
            mask: None for causal; otherwise zero or False = hidden, (T, S), (B, T, S) or
                (B, 1, T, S). A lower-triangular one in host memory is recognised as causal.
            cache: one layer of a `lmfast.KVCache`; keys and values are appended to it, and the
                queries continue where it ended.
            positions: for the rotation, as in `RotaryEmbedding.forward`; by default they continue
                the cache or start at 0.

        Returns:
            (B, T, E).
        """
        batch, steps, _ = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = (x @ self.W_QKV).view(batch, steps, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)  # (B, H, T, D)
        offset: int | Tensor | None = None
        length = None
        if cache is not None:
            offset = cache.offset
            length = cache.longest + steps
            positions = offset if positions is None else positions
        # Without gradients q and k are ours alone, fresh from the product: rotate them in place.
        inplace = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        q, k = self.rope(q, k, positions, length=length, inplace=inplace)
        if cache is not None:
            k, v = cache.append(k, v)
            q = q.to(k.dtype)  # under autocast the cache has the parameters' dtype
        out = attend(q, k, v, mask=mask, q_offset=offset)  # (B, H, T, D)
        return out.transpose(1, 2).reshape(batch, steps, heads * self.head_dim) @ self.W_O

    def _head_columns(self, packed: Tensor) -> list[tuple[str, Tensor]]:
        """Return (name, view (E, D) of the packed matrix) of every head, in the packed order."""
        names = [f"heads.{h}.W_Q" for h in range(self.num_heads)]
        names += [f"heads.{h}.W_K" for h in range(self.num_kv_heads)]
        names += [f"heads.{h}.W_V" for h in range(self.num_kv_heads)]
        return list(zip(names, packed.split(self.head_dim, dim=1)))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = destination.pop(f"{prefix}W_QKV")
        joint = destination.pop(f"{prefix}W_O")
        for name, columns in self._head_columns(packed):
            destination[prefix + name] = columns
        destination[f"{prefix}W_O"] = joint

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
        names = [prefix + name for name, _ in self._head_columns(self.W_QKV)]
        parts = {name: state_dict.pop(name) for name in names if name in state_dict}
        absent = [name for name in names if name not in parts]
        shape = (self.emb_dim, self.head_dim)
        wrong = {name: tuple(part.shape) for name, part in parts.items() if part.shape != shape}
        for name, found in wrong.items():
            error_msgs.append(f"{name} must have shape {shape}, the state dict has {found}")
        if not absent and not wrong:
            state_dict[f"{prefix}W_QKV"] = torch.cat([parts[name] for name in names], dim=1)
        packed_missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, packed_missing, unexpected_keys, error_msgs
        )
        for name in packed_missing:
            if name != f"{prefix}W_QKV":
                missing_keys.append(name)
            else:  # named as the file should have named them
                missing_keys.extend(absent)

    def extra_repr(self) -> str:
        return (
            f"{self.emb_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}"
        )
