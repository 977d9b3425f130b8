"""The specification of causal discovery against definitions written another way, and against itself."""

import numpy as np
import pytest
from graphs import random_dag

from causalattn.reference.discovery import mag, pag_by_enumeration, true_pag

SHAPES = [
    (degree, latents, selected) for degree in (0.8, 1.2, 1.6) for latents in (0, 0.2, 0.4) for selected in (0, 0.3)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rules_find_the_pag_that_enumeration_finds(shape):
    degree, latents, selected = shape
    for seed in range(20):
        example = random_dag(seed, 4 + seed % 2, degree=degree, latents=latents, selected=selected)
        assert np.array_equal(true_pag(*example), pag_by_enumeration(mag(*example)))
