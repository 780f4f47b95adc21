"""Training data: sources of text, the tokenizer, token shards on disk, and rows of packed documents."""

from rooflight.models.tokenizer import Tokenizer, Vocabulary
from rooflight.train.data.build import tokenize
from rooflight.train.data.dataset import IGNORE, Dataset, Rows
from rooflight.train.data.prefetch import Prefetch
from rooflight.train.data.shards import Store, open_shards
from rooflight.train.data.sources import Sources, documents, resolve
from rooflight.train.data.writer import Progress

__all__ = [
    "IGNORE", "Dataset", "Prefetch", "Progress", "Rows", "Sources", "Store", "Tokenizer", "Vocabulary", "documents",
    "open_shards", "resolve", "tokenize",
]  # fmt: skip
