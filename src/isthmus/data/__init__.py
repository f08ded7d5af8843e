"""Files, directories and Hugging Face data sets as streams of records; tokenizers; real text without a download."""

from isthmus.data.demo import standard_library_text, train_tokenizer
from isthmus.data.hub import parse_hub_name
from isthmus.data.record import Record
from isthmus.data.records import read_records, read_table
from isthmus.data.tokenizer import load_tokenizer, pad_token_id

__all__ = [
    "Record",
    "load_tokenizer",
    "pad_token_id",
    "parse_hub_name",
    "read_records",
    "read_table",
    "standard_library_text",
    "train_tokenizer",
]
