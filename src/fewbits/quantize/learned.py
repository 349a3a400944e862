"""What calibration has taught of each tensor, as the execution of a plan asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fewbits.codecs import Codec
from fewbits.methods import Factor
from fewbits.methods.gptq import feedback_span
from fewbits.quantize.hessians import Factors
from fewbits.quantize.importances import Importances


@dataclass(frozen=True)
class Learned:
    """What there is of it.

    Attributes:
        importances: by tensor name.
        factors: of the Hessians.
    """

    importances: Importances = field(default_factory=dict)
    factors: Factors | None = None

    def importance(self, name: str, expert: int) -> npt.NDArray[np.float32] | None:
        """float32 [columns], or None for ones."""
        return self.importances[name][expert] if name in self.importances else None

    def factor(self, name: str, expert: int, kind: type[Codec]) -> Factor | None:
        """The factor of the Hessian as a type needs it, None where too little is known or the type is only searched."""
        span = feedback_span(kind)
        return self.factors.of(name, expert, span) if self.factors and span else None
