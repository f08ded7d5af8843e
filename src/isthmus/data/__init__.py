"""Files, directories and Hugging Face data sets as streams of records; tokenizers; real text without a download."""

from isthmus.data.demo import standard_library_text, train_tokenizer
from isthmus.data.record import Record
from isthmus.data.records import read_records
from isthmus.data.tokenizer import load_tokenizer, pad_token_id

__all__ = ["Record", "load_tokenizer", "pad_token_id", "read_records", "standard_library_text", "train_tokenizer"]
