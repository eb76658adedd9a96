"""The MLP of `same_position`: one hidden layer from the codes before a module to those after it, fitted by Adam.

Squared error of targets over their standard deviation, inputs over their root mean square; no penalty. What it explains
beyond the linear map of the same position is nonlinear, what it does not is noise, or moved from elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes, dense

BATCH = 1024


def fit_mlp(
    train: Pair, width: int = 256, epochs: int = 10, *, learning_rate: float = 1e-3, batch: int = BATCH, seed: int = 0
) -> Trained:
    """An MLP fitted on a pair; the rate falls to 0 along a cosine.

    Args:
        train: codes.
        width: hidden units.
        epochs: times that all tokens are seen, but for those that fill no batch (others in each epoch).
        learning_rate: of Adam, at the start.
        batch: tokens at once, or all where there are fewer.
        seed: of the weights and of the order.

    Raises:
        InputError: a number below 1, a rate that is not above 0.
    """
    if min(width, epochs, batch, len(train)) < 1 or not learning_rate > 0:
        raise InputError(
            f"{len(train)} tokens, width {width}, {epochs} epochs, batch {batch}, rate {learning_rate}: give at least "
            "1 of each, and a rate above 0"
        )
    connector = MLP(n_features=width).sized(train.inputs.n_features, train.targets.n_features)
    batch = min(batch, len(train))
    steps = epochs * (len(train) // batch)
    (_, norm), (std, _) = spreads(train.inputs), spreads(train.targets)
    norm, std = (np.where(each > 0, each, 1).astype(np.float32) for each in (norm, std))
    params = connector.init(jax.random.key(seed))
    frozen = {name: params.pop(name) for name in connector.frozen}
    state = _optimiser(learning_rate, steps).init(params)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(order) - batch + 1, batch):
            rows = np.sort(order[start : start + batch])
            codes = [_scaled(side.at(rows), by) for side, by in ((train.inputs, norm), (train.targets, std))]
            params, state = _step(params, state, frozen, *codes, connector, learning_rate, steps)
    return Trained(connector, connector.in_own_units(params | frozen, jnp.array(norm), jnp.array(std)))


def spreads(site: SiteCodes) -> tuple[np.ndarray, np.ndarray]:
    """(standard deviation, root mean square) of each feature over all tokens, `[n_features]` float64."""
    values, indices = np.asarray(site.values, np.float64).reshape(-1), np.asarray(site.indices).reshape(-1)
    mean, square = (np.bincount(indices, each, site.n_features) / len(site) for each in (values, values**2))
    return np.sqrt(np.maximum(square - mean**2, 0)), np.sqrt(square)


def _scaled(codes: SparseCodes, by: np.ndarray) -> SparseCodes:
    return SparseCodes(jnp.array(codes.values / by[codes.indices]), jnp.array(codes.indices))


def _optimiser(learning_rate, steps):
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(1, steps)))


@partial(jax.jit, static_argnames=("connector", "learning_rate", "steps"), donate_argnames=("params", "state"))
def _step(params, state, frozen, x, y, connector, learning_rate, steps):
    target = dense(y, connector.d_out)

    def loss(params):
        return jnp.mean(jnp.sum((connector.predict(params | frozen, x) - target) ** 2, axis=-1))

    grads = jax.grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        updates, state = _optimiser(learning_rate, steps).update(grads, state, params)
    return optax.apply_updates(params, updates), state
