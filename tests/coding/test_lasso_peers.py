"""The same objective as scikit-learn's Lasso and sparse_encode, with the conversions of lambda that lasso.py states."""

import numpy as np
import pytest

from sparse_jax.coding import fista_until, kkt_violation, lasso
from tests.coding import problems
from tests.coding.test_fista import arrays

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("x64")]  # with the other peers
PENALTY = 0.3


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("solver", [fista_until, lasso])
@pytest.mark.parametrize(("d", "n"), [(10, 40), (40, 15), (16, 16)])
def test_objective(signed, solver, d, n):
    linear_model = pytest.importorskip("sklearn.linear_model")
    decomposition = pytest.importorskip("sklearn.decomposition")
    x, W = problems.coherent(rows=8, d=d, n=n)
    W = problems.unit(W)
    ours = solver(*arrays(x, W, PENALTY), 1e-10, measure="kkt", signed=signed).codes
    assert np.all(kkt_violation(*arrays(x, W, PENALTY, ours), signed) <= 1.01e-10)
    model = linear_model.Lasso(
        alpha=PENALTY / (2 * d), positive=not signed, fit_intercept=False, tol=1e-14, max_iter=1_000_000
    )
    by_lasso = np.stack([model.fit(W.T, row).coef_ for row in x])
    by_encode = decomposition.sparse_encode(
        x, W, algorithm="lasso_cd", alpha=PENALTY / 2, positive=not signed, max_iter=1_000_000
    )
    value = problems.objective(x, W, PENALTY, ours)
    np.testing.assert_allclose(value, problems.objective(x, W, PENALTY, by_lasso), rtol=1e-6)
    np.testing.assert_allclose(value, problems.objective(x, W, PENALTY, by_encode), rtol=1e-6)
    assert np.any(ours < 0) == signed
