"""Loss curves and attention weights as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def plot_losses(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
) -> None:
    """Draw one line per curve, loss over training steps.

    Args:
        path: of the PNG file to write.
        curves: label -> (steps, losses). A label that starts with "textbook" is drawn dashed on
            top, so that two curves that agree are both seen.
        title: above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure((8, 5))
    axes = figure.add_subplot()
    for label, (steps, losses) in curves.items():
        textbook = label.startswith("textbook")
        axes.plot(
            steps,
            losses,
            "--" if textbook else "-",
            label=label,
            linewidth=1.2 if textbook else 2.2,
            color="black" if textbook else None,
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def plot_attention(
    path: str | Path,
    weights: Tensor,
    source: Sequence[str],
    output: Sequence[str],
    *,
    title: str = "",
) -> None:
    """Draw attention weights as a matrix, source tokens across and output tokens down.

    Args:
        path: of the PNG file to write.
        weights: (T, S), such as a row of `Translation.attention`.
        source: S labels.
        output: T labels.
        title: above the plot.

    Raises:
        ValueError: other numbers of labels than the weights have rows and columns.
        ImportError: matplotlib is not installed.
    """
    if weights.shape != (len(output), len(source)):
        raise ValueError(
            f"weights must be (T, S) for {len(output)} output and {len(source)} source labels, "
            f"got {tuple(weights.shape)}"
        )
    figure = _figure((2 + 0.4 * len(source), 1.5 + 0.35 * len(output)))
    axes = figure.add_subplot()
    values = weights.detach().float().cpu().numpy()
    image = axes.imshow(values, cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=90)
    axes.set_yticks(range(len(output)), output)
    axes.xaxis.tick_top()
    axes.set_title(title)
    figure.colorbar(image, label="weight")
    figure.savefig(path, dpi=120, format="png")


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure; ImportError in words when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'lmfast[plot]', or go without the PNG"
        ) from error
    return Figure(figsize=size, layout="constrained")
