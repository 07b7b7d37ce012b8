"""The reference models of the training benchmarks, in three implementations: ours, the textbook's,
and as a good PyTorch programmer writes them today. All compute the same and start from the same
parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.models.textbook import TextbookDecoder, TextbookRecurrent

EMB_DIM, NUM_HEADS, NUM_LAYERS = 128, 8, 2


def reference_models(
    kind: str, vocab_size: int, context: int
) -> tuple[LanguageModel, nn.Module, nn.Module]:
    """Return the "decoder" or the "recurrent" one: ours, the textbook's and PyTorch's."""
    textbook: nn.Module
    if kind == "decoder":
        sizes = (vocab_size, EMB_DIM, NUM_HEADS, NUM_LAYERS, 0)
        decoder = DecoderLanguageModel(*sizes)
        textbook = TextbookDecoder(*sizes)
        textbook.load_state_dict(decoder.state_dict())
        return decoder, textbook, SdpaDecoder(decoder, context)
    recurrent = RecurrentLanguageModel(vocab_size, EMB_DIM, NUM_LAYERS, 0)
    textbook = TextbookRecurrent(vocab_size, EMB_DIM, NUM_LAYERS, 0)
    textbook.load_state_dict(recurrent.state_dict())
    return recurrent, textbook, TorchRecurrent(recurrent)


class SdpaBlock(nn.Module):
    """Packed projections, `scaled_dot_product_attention`, `F.rms_norm`."""

    def __init__(self, emb_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.Parameter(torch.ones(emb_dim))
        self.norm2 = nn.Parameter(torch.ones(emb_dim))
        self.qkv = nn.Linear(emb_dim, 3 * emb_dim, bias=False)
        self.out = nn.Linear(emb_dim, emb_dim, bias=False)
        self.up = nn.Linear(emb_dim, 4 * emb_dim)
        self.down = nn.Linear(4 * emb_dim, emb_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, steps, width = x.shape
        packed = self.qkv(F.rms_norm(x, (width,), self.norm1, 1e-8))
        q, k, v = packed.view(batch, steps, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, steps, width))
        return x + self.down(F.relu(self.up(F.rms_norm(x, (width,), self.norm2, 1e-8))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on adjacent pairs of x (B, H, T, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class SdpaDecoder(nn.Module):
    """`DecoderLanguageModel` in PyTorch's own fused functions; give its loss to `torch.compile`."""

    def __init__(self, model: DecoderLanguageModel, context: int) -> None:
        super().__init__()
        vocab_size, width = model.vocab_size, model.emb_dim
        heads = model.options["num_heads"]
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=model.pad_idx)
        self.blocks = nn.ModuleList(SdpaBlock(width, heads) for _ in model.layers)
        self.output = nn.Linear(width, vocab_size, bias=False)
        pairs = torch.arange(0, width // heads, 2) / (width // heads)
        angles = torch.arange(context)[:, None] * 10000.0**-pairs
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        state = model.state_dict()
        with torch.no_grad():
            self.embedding.weight.copy_(state["embedding.weight"])
            self.output.weight.copy_(state["output"].t())
            for index, block in enumerate(self.blocks):
                name = f"layers.{index}."
                projections = [
                    state[f"{name}attn.heads.{head}.{kind}"]
                    for kind in ("W_Q", "W_K", "W_V")
                    for head in range(heads)
                ]
                block.qkv.weight.copy_(torch.cat(projections, dim=1).t())
                block.out.weight.copy_(state[f"{name}attn.W_O"].t())
                block.up.weight.copy_(state[f"{name}mlp.W_1"].t())
                block.up.bias.copy_(state[f"{name}mlp.B_1"])
                block.down.weight.copy_(state[f"{name}mlp.W_2"].t())
                block.down.bias.copy_(state[f"{name}mlp.B_2"])
                block.norm1.copy_(state[f"{name}norm1.scale"])
                block.norm2.copy_(state[f"{name}norm2.scale"])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.output(x)


class TorchRecurrent(nn.Module):
    """`RecurrentLanguageModel` on `torch.nn.RNN`, PyTorch's own fused Elman network."""

    def __init__(self, model: RecurrentLanguageModel) -> None:
        super().__init__()
        width, layers = model.emb_dim, model.rnn.num_layers
        self.embedding = nn.Embedding(model.vocab_size, width, padding_idx=model.pad_idx)
        self.rnn = nn.RNN(width, width, layers, batch_first=True)
        self.output = nn.Linear(width, model.vocab_size)
        with torch.no_grad():
            self.embedding.weight.copy_(model.embedding.weight)
            self.output.load_state_dict(model.fc.state_dict())
            for layer, unit in enumerate(model.rnn.units()):
                getattr(self.rnn, f"weight_ih_l{layer}").copy_(unit.Wh.t())
                getattr(self.rnn, f"weight_hh_l{layer}").copy_(unit.Uh.t())
                getattr(self.rnn, f"bias_ih_l{layer}").copy_(unit.b)
                # Two biases where ours has one: the second would double its learning rate.
                getattr(self.rnn, f"bias_hh_l{layer}").zero_().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.rnn(self.embedding(ids))[0])
