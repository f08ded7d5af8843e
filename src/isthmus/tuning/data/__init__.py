"""Training data, from records to micro-batches: interpret, tokenise, fit, pack, batch."""

from isthmus.tuning.data.batches import IGNORED, BatchStream, MicroBatch
from isthmus.tuning.data.dataset import LoadSummary, TokenDataset, load_dataset, load_dataset_for
from isthmus.tuning.data.isolation import keep_documents_apart

__all__ = [
    "load_dataset",
    "load_dataset_for",
    "TokenDataset",
    "LoadSummary",
    "BatchStream",
    "MicroBatch",
    "IGNORED",
    "keep_documents_apart",
]
