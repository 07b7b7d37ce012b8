"""The demo's table, text samples and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmfast._table import format_table
from lmfast.demo.settings import MODELS

Results = Mapping[tuple[str, str], Mapping[str, Any]]  # (model, implementation) -> figures

_COLUMNS = (
    ("train loss", "final_loss", "{:.4f}", 1),
    ("held-out loss", "held_out_loss", "{:.4f}", 1),
    ("perplexity", "held_out_perplexity", "{:.2f}", 1),
    ("train tokens/s", "train_tokens_per_second", "{:,.0f}", 1),
    ("generate tokens/s", "generate_tokens_per_second", "{:,.0f}", 1),
    ("peak memory MB", "peak_memory_bytes", "{:,.0f}", 1e6),
)

# How far apart the two training losses of one step may be. Sums in another order differ by an ulp
# or two, and AdamW, which divides by the root of second moments that are tiny at first, enlarges
# that step by step: 1.4e-2 measured within 160 steps in fp32. Products in bf16 differ by 2^-9.
LOSS_TOLERANCE = {"highest": 0.03, "high": 0.1, "medium": 0.1}


def ratios(results: Results, model: str) -> dict[str, float]:
    """Return ours against the textbook: speeds as multiples, memory as the textbook's multiple."""
    ours, textbook = results[model, "lmfast"], results[model, "textbook"]
    return {
        "train_tokens_per_second": ours["train_tokens_per_second"]
        / textbook["train_tokens_per_second"],
        "generate_tokens_per_second": ours["generate_tokens_per_second"]
        / textbook["generate_tokens_per_second"],
        "peak_memory_bytes": textbook["peak_memory_bytes"] / max(ours["peak_memory_bytes"], 1),
    }


def largest_difference(results: Results, model: str) -> float:
    """Return the largest distance between the two training curves of a model."""
    pairs = zip(results[model, "lmfast"]["losses"], results[model, "textbook"]["losses"])
    return max(abs(a - b) for a, b in pairs)


def table(results: Results) -> str:
    """Return the figures of all runs as one table, with a line of ratios per model."""
    lines = [["", *(title for title, *_ in _COLUMNS)]]
    for model in MODELS:
        for implementation in ("lmfast", "textbook"):
            figures = results[model, implementation]
            cells = [form.format(figures[key] / unit) for _, key, form, unit in _COLUMNS]
            lines.append([f"{model} {implementation}", *cells])
        gains = ratios(results, model)
        difference = abs(
            results[model, "lmfast"]["held_out_loss"] - results[model, "textbook"]["held_out_loss"]
        )
        words = {
            "final_loss": "",
            "held_out_loss": f"{difference:.4f} apart",
            "held_out_perplexity": "",
            "train_tokens_per_second": "{:.2f}x",
            "generate_tokens_per_second": "{:.2f}x",
            "peak_memory_bytes": "1/{:.1f}",
        }
        cells = [words[key].format(gains.get(key)) for _, key, *_ in _COLUMNS]
        lines.append(["  ours against it", *cells])
    return format_table(lines)
