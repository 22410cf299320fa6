# SPDX-License-Identifier: Apache-2.0
"""Which public text each domain reads."""

from __future__ import annotations

import numpy as np
import pytest

from deepfusion.methods.reading import domain_weights


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_public_text_is_drawn_by_its_closeness_to_the_domain(temperature: float) -> None:
    closeness_UK = np.asarray([[0.9, -0.3], [0.8, 0.1], [-1.0, 1.0]])
    weights = domain_weights(closeness_UK, "domain", temperature)
    for domain, weights_U in enumerate(weights):
        assert weights_U is not None
        assert weights_U.max() == 1, "no weight runs over, however low the temperature"
        gap = closeness_UK[0, domain] - closeness_UK[1, domain]
        assert np.log(weights_U[0] / weights_U[1]) == pytest.approx(gap / temperature)


def test_uniform_text_has_no_weights() -> None:
    assert domain_weights(np.zeros((5, 3)), "uniform", 0.1) == [None] * 3
