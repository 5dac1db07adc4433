"""From data cells to tokens, before any process starts, and the order in which ranks see them. No torch."""

from collie_lab.data.documents import Documents
from collie_lab.data.hub import context_length, model_config
from collie_lab.data.order import Order, Step, pack
from collie_lab.data.prepare import Prepared, prepare, question_tokens, room_for_documents, sequence_length
from collie_lab.data.records import Document, read_documents
from collie_lab.data.skills import make_skills
from collie_lab.data.tokenizer import Tokenizer, save_tokenizer
from collie_lab.data.vocabulary import Extension, expected_extension, make_tokenizer

__all__ = [
    "Document", "Documents", "Extension", "Order", "Prepared", "Step", "Tokenizer", "context_length",
    "expected_extension", "make_skills", "make_tokenizer", "model_config", "pack", "prepare", "question_tokens",
    "read_documents", "room_for_documents", "save_tokenizer", "sequence_length",
]
