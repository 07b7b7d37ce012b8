"""What the demo runs with."""

from __future__ import annotations

from dataclasses import dataclass, replace

MODELS = ("recurrent", "decoder")
IMPLEMENTATIONS = ("lmfast", "textbook")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and numbers of steps; the defaults take about three minutes on two cores.

    The models are the reference ones of the textbook: width 128, 2 layers or blocks, 8 heads. The
    16,000 tokens of the vocabulary and 160 steps are what fits into the time with 2 MB of text.
    """

    vocab_size: int = 16_000
    emb_dim: int = 128
    num_layers: int = 2
    num_heads: int = 8
    batch_size: int = 64
    context: int = 32
    steps: int = 160
    decoder_learning_rate: float = 3e-3
    recurrent_learning_rate: float = 5e-3
    held_out: float = 0.05
    new_tokens: int = 128
    generate_repeats: int = 3
    text_characters: int = 2_000_000
    precision: str = "highest"
    seed: int = 42
    prompt: str = "The following methods return"

    def quick(self) -> DemoSettings:
        """Return settings that run everything in a few seconds, too small to say anything."""
        return replace(
            self,
            vocab_size=600,
            emb_dim=32,
            num_layers=1,
            num_heads=4,
            batch_size=8,
            context=16,
            steps=8,
            new_tokens=12,
            generate_repeats=1,
            text_characters=60_000,
        )
