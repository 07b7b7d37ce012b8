"""Training: texts, batches, the training loop, evaluation and checkpoints."""

from lmfast.training.archives import extract_archive
from lmfast.training.batches import Batches, ContiguousBatches, PackedBatches, PaddedBatches
from lmfast.training.chat_format import CHAT_FORMATS, ChatFormat
from lmfast.training.checkpoint import latest_checkpoint, load_model, save_model
from lmfast.training.completions import (
    CompletionBatches,
    CompletionExample,
    PaddedExamples,
    completion_example,
    pad_examples,
)
from lmfast.training.files import CheckpointError
from lmfast.training.logs import CsvLog, Log, TensorBoardLog
from lmfast.training.low_rank import LoRA, lora
from lmfast.training.metrics import Evaluation, RunningLoss, evaluate, perplexity
from lmfast.training.plots import plot_attention, plot_losses
from lmfast.training.processes import Processes, process_group
from lmfast.training.report import TrainingReport
from lmfast.training.schedule import Schedule
from lmfast.training.seeding import seed_everything
from lmfast.training.sources import (
    DataError,
    DatasetTexts,
    JsonLines,
    TextFiles,
    TextSource,
    open_texts,
)
from lmfast.training.steps import TrainingDiverged
from lmfast.training.streaming import StreamedBatches
from lmfast.training.text import (
    SPECIAL_TOKENS,
    encode_lines,
    encode_text,
    encode_texts,
    read_text,
    split_text,
)
from lmfast.training.trainer import Trainer

__all__ = [
    "CHAT_FORMATS",
    "SPECIAL_TOKENS",
    "Batches",
    "ChatFormat",
    "CheckpointError",
    "CompletionBatches",
    "CompletionExample",
    "ContiguousBatches",
    "CsvLog",
    "DataError",
    "DatasetTexts",
    "Evaluation",
    "JsonLines",
    "LoRA",
    "Log",
    "PackedBatches",
    "PaddedBatches",
    "PaddedExamples",
    "Processes",
    "RunningLoss",
    "Schedule",
    "StreamedBatches",
    "TensorBoardLog",
    "TextFiles",
    "TextSource",
    "Trainer",
    "TrainingDiverged",
    "TrainingReport",
    "completion_example",
    "encode_lines",
    "encode_text",
    "encode_texts",
    "evaluate",
    "extract_archive",
    "latest_checkpoint",
    "load_model",
    "lora",
    "open_texts",
    "pad_examples",
    "perplexity",
    "plot_attention",
    "plot_losses",
    "process_group",
    "read_text",
    "save_model",
    "seed_everything",
    "split_text",
]
