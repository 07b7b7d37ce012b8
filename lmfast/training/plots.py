"""Loss curves as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'lmfast[plot]', or go without the PNG"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
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
