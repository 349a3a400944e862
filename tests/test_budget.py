"""The budget solver: never over, the best there is, and honest about how far from it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.plan import budget as budget_module
from fewbits.plan.budget import Option, spend

options = st.lists(
    st.builds(Option, st.just("T"), st.integers(1, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=5
)


def best(tensors: list[list[Option]], budget: int) -> float | None:
    """By trying everything."""
    found = [
        sum(option.loss for option in choice)
        for choice in product(*tensors)
        if sum(option.nbytes for option in choice) <= budget
    ]
    return min(found, default=None)


@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 250))
@settings(max_examples=400, deadline=None)
def test_the_choice_is_the_best_there_is(tensors: list[list[Option]], budget: int) -> None:
    wanted = best(tensors, budget)
    if wanted is None:
        with pytest.raises(FewbitsError, match="smallest mixture takes"):
            spend(tensors, budget)
        return
    found = spend(tensors, budget)
    chosen = [options[pick] for options, pick in zip(tensors, found.picks, strict=True)]
    assert found.nbytes == sum(option.nbytes for option in chosen) <= budget
    assert found.loss == pytest.approx(wanted, abs=1e-9)
    assert found.bound <= wanted + 1e-6 * max(1, wanted)


@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 250))
@settings(max_examples=200, deadline=None)
def test_with_rounded_sizes_it_stays_within_the_budget_and_above_its_bound(
    tensors: list[list[Option]], budget: int
) -> None:
    wanted = best(tensors, budget)
    if wanted is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_module, "STATES", 7)
        found = spend(tensors, budget)
    assert found.nbytes <= budget
    assert found.bound - 1e-6 <= wanted <= found.loss + 1e-9


def test_a_model_of_real_size_is_solved_exactly_and_fully_spent() -> None:
    types = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)] * 32
    tensors = [
        [
            Option(name, rows * columns // 256 * size, (1 + number % 7) * 4.0 ** (-size / 32))
            for name, size in types.items()
        ]
        for number, (rows, columns) in enumerate(shapes)
    ]
    budget = int(sum(rows * columns for rows, columns in shapes) * 3.9 / 8)
    found = spend(tensors, budget)
    assert 0.995 * budget < found.nbytes <= budget
    assert found.bound <= found.loss < 1.001 * found.bound
    assert spend(tensors, budget) == found
