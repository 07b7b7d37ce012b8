"""Training: batches of text, the training loop, evaluation and checkpoints."""

from lmfast.training.checkpoint import CheckpointError, latest_checkpoint, load_model, save_model
from lmfast.training.data import (
    SPECIAL_TOKENS,
    Batches,
    PackedBatches,
    PaddedBatches,
    encode_lines,
    encode_text,
    read_text,
    split_text,
)
from lmfast.training.metrics import Evaluation, RunningLoss, evaluate, perplexity
from lmfast.training.plots import plot_attention, plot_losses
from lmfast.training.seeding import seed_everything
from lmfast.training.trainer import Trainer, TrainingDiverged, TrainingReport

__all__ = [
    "SPECIAL_TOKENS",
    "Batches",
    "CheckpointError",
    "Evaluation",
    "PackedBatches",
    "PaddedBatches",
    "RunningLoss",
    "Trainer",
    "TrainingDiverged",
    "TrainingReport",
    "encode_lines",
    "encode_text",
    "evaluate",
    "latest_checkpoint",
    "load_model",
    "perplexity",
    "plot_attention",
    "plot_losses",
    "read_text",
    "save_model",
    "seed_everything",
    "split_text",
]
