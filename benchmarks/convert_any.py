"""llama.cpp's convert_hf_to_gguf.py on a model whose pre-tokenizer it does not know by hash (taken as gpt-2's)."""

from __future__ import annotations

import runpy
import sys

sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "bf16"]
runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")
