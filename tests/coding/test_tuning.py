"""The penalty for a wished number of active features."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import lasso, penalty_for_l0
from sparse_jax.errors import InputError
from tests.coding import problems


@pytest.mark.parametrize(("l0", "signed"), [(3.0, False), (8.0, True)])
def test_the_wished_number_is_active(l0, signed):
    x, W = (jnp.array(a, jnp.float32) for a in problems.coherent(rows=100, d=20, n=60))
    penalty, found = penalty_for_l0(x, W, l0, signed=signed, within=0.02)
    codes = lasso(x, W, penalty, signed=signed).codes
    np.testing.assert_allclose(np.mean(np.sum(np.asarray(codes) != 0, axis=1)), found, rtol=1e-6)
    assert abs(found / l0 - 1) <= 0.02


def test_what_no_penalty_gives():
    x, W = (jnp.array(a, jnp.float32) for a in problems.coherent(rows=10))
    for l0, rows in ((0.0, x), (40.0, x), (3.0, 0 * x)):
        with pytest.raises(InputError, match="give more than 0 and less than 40"):
            penalty_for_l0(rows, W, l0)
    with pytest.raises(InputError, match="even a penalty of"):
        penalty_for_l0(x, W[:5].at[1:].set(0), 4.0)
