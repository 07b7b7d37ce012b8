"""Training low-rank updates on the CPU: a layer, and steps of whole models, forward and backward.

Peers: PEFT's layer around the same `nn.Linear`, and what one writes by hand, `linear(x) +
s (x A) B`. Weights are frozen, rank 8, no dropout, no optimiser.

The limit of a layer: with K inputs and N outputs the frozen matrix takes 2 K N operations per row
forward and 2 K N backward, the update 6 R (K + N); at R = 8 and K = N = 768 that is 6 % more. What
can be won is what the peers spend on passes over the output and over the gradient of x.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmfast.models import DecoderLanguageModel
from lmfast.models.textbook import TextbookDecoder, textbook_loss
from lmfast.training import lora

peft = pytest.importorskip("peft")

RANK, ALPHA = 8, 16.0
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class ByHand(nn.Module):
    """A linear layer and two more products."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        dtype = layer.weight.dtype
        self.A = nn.Parameter(torch.randn(layer.in_features, RANK, dtype=dtype) * 0.02)
        self.B = nn.Parameter(torch.zeros(RANK, layer.out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + ALPHA / RANK * (x @ self.A @ self.B)


def by_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0)
    return peft.inject_adapter_in_model(config, model)


@DTYPES
@pytest.mark.parametrize("shape", [(2048, 288, 288), (512, 768, 768), (512, 768, 3072)])
def bench_layer(
    compare: Callable[..., Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, k, n = shape
    plain = nn.Sequential(nn.Linear(k, n)).to(dtype)
    plain.requires_grad_(False)
    x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, n, dtype=dtype)

    def both_ways(model: nn.Module) -> Callable[[], None]:
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(model(x), wanted, dy)  # type: ignore[return-value]

    ours = copy.deepcopy(plain)
    lora(ours, RANK, ALPHA)
    hand = nn.Sequential(ByHand(copy.deepcopy(plain)[0]))
    compare(
        f"LoRA layer {rows}x{k}x{n} {dtype}",
        both_ways(ours),
        {
            "peft": both_ways(by_peft(copy.deepcopy(plain), ["0"])),
            "by_hand": both_ways(hand),
            # What no update at all would cost.
            "frozen": lambda: torch.autograd.grad(plain(x), x, dy),
        },
        flops=4.0 * rows * k * n,
        dtype=dtype,
        rounds=31,
    )


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    return run


def bench_packed_projections(compare: Callable[..., Any]) -> None:
    """All matrices of our decoder; the peer is the textbook's with `W + s A B` written out."""
    torch.manual_seed(0)
    ids = torch.randint(1, 8000, (16, 65))
    ours = DecoderLanguageModel(8000, 256, 4, 4, 0)
    lora(ours, RANK, ALPHA)
    bare = TextbookDecoder(8000, 256, 4, 4, 0)
    lora(bare, RANK, ALPHA, targets=["W_Q", "W_K", "W_V", "W_O", "W_1", "W_2"])
    compare(
        "LoRA step, packed projections",
        step(ours, lambda m: m.loss(ids[:, :-1], ids[:, 1:])),  # type: ignore[operator]
        {"bare_parameters": step(bare, lambda m: textbook_loss(m, ids[:, :-1], ids[:, 1:], -100))},
        rounds=7,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_transformers(compare: Callable[..., Any], precision: str) -> None:
    """A Llama of 15M parameters: PEFT's adapters on it as it comes, ours on it patched."""
    transformers = pytest.importorskip("transformers")
    import lmfast

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        vocab_size=32000,
    )
    model = transformers.LlamaForCausalLM(config)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ids = torch.randint(5, 1000, (8, 256))

    def loss(m: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return m(input_ids=ids, labels=ids, use_cache=False).loss

    def frozen(m: nn.Module) -> nn.Module:
        for name, p in m.named_parameters():
            p.requires_grad_("lora_" in name)
        return m

    ours = copy.deepcopy(model)
    lora(ours, RANK, ALPHA, targets)
    lmfast.patch(ours)
    theirs = frozen(by_peft(copy.deepcopy(model), targets))
    patched = frozen(by_peft(copy.deepcopy(model), targets))
    lmfast.patch(patched)
    compare(
        f"LoRA step, Llama 15M, {precision}",
        step(ours.train(), loss),
        {"peft": step(theirs.train(), loss), "peft_patched": step(patched.train(), loss)},
        rounds=5,
    )
