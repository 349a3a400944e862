"""Reading models lazily: safetensors directories, GGUF files and hub ids."""

from fewbits.checkpoint.base import Checkpoint, TensorInfo
from fewbits.checkpoint.gguf import GGUFCheckpoint
from fewbits.checkpoint.model import Model, open_checkpoint, open_model
from fewbits.checkpoint.safetensors import SafetensorsCheckpoint

__all__ = [
    "Checkpoint",
    "GGUFCheckpoint",
    "Model",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "open_checkpoint",
    "open_model",
]
