"""Text -> activations -> statistics of every linear layer's inputs, one decoder block in memory at a time."""

from fewbits.calibration.imatrix_files import read_statistics, write_statistics
from fewbits.calibration.statistics import Statistics, TensorStatistics

__all__ = ["Statistics", "TensorStatistics", "read_statistics", "write_statistics"]
