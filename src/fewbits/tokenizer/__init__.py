"""Tokenizers: Hugging Face files and GGUF metadata, one into the other."""

from fewbits.tokenizer.files import load_tokenizer
from fewbits.tokenizer.from_gguf import tokenizer_from_gguf
from fewbits.tokenizer.to_gguf import gguf_tokenizer

__all__ = ["gguf_tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
