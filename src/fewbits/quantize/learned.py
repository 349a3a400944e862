"""What calibration has taught of each tensor, as the execution of a plan asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fewbits.methods import Factor
from fewbits.quantize.hessians import Factors
from fewbits.quantize.importances import Importances


@dataclass(frozen=True)
class Learned:
    """Importances by tensor name, and the Hessians' factors, if there are any."""

    importances: Importances = field(default_factory=dict)
    factors: Factors | None = None

    def importance(self, name: str, expert: int) -> npt.NDArray[np.float32] | None:
        """float32 [columns], or None for ones."""
        return self.importances[name][expert] if name in self.importances else None

    def factor(self, name: str, expert: int) -> Factor | None:
        """The factor of the Hessian, None where too little is known."""
        return self.factors.of(name, expert) if self.factors else None
