"""Whether files on disk are whole: every tensor decoded, sizes, hashes, tokenizer, configuration, a reference."""

from fewbits.verify.report import CheckedFile, Fault, TensorError, VerifyReport
from fewbits.verify.run import verify

__all__ = ["CheckedFile", "Fault", "TensorError", "VerifyReport", "verify"]
