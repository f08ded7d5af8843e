"""Training data, from files to micro-batches: read, tokenise, fit, pack, batch. And text and a tokenizer for demos."""

from isthmus.tuning.data.batches import IGNORED, BatchStream, MicroBatch
from isthmus.tuning.data.dataset import LoadSummary, TokenDataset, load_dataset
from isthmus.tuning.data.demo import standard_library_text, train_tokenizer
from isthmus.tuning.data.isolation import keep_documents_apart
from isthmus.tuning.data.tokenizer import load_tokenizer

__all__ = [
    "load_dataset",
    "TokenDataset",
    "LoadSummary",
    "BatchStream",
    "MicroBatch",
    "IGNORED",
    "keep_documents_apart",
    "load_tokenizer",
    "standard_library_text",
    "train_tokenizer",
]
