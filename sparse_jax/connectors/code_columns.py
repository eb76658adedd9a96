"""Codes by feature instead of by token: where each fires and how strongly, which is what reading a connection asks for.

columns = code_columns(pair.inputs)                         scipy CSC [tokens, features], stored where code > 0
hidden  = hidden_columns(connector, params, pair.inputs)    the same of a connector's hidden units
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparse_jax.connectors.paired_codes import SiteCodes
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes

# Tokens whose hidden units are made at once: one shape, one compiled program.
_ROWS = 2048


def code_columns(codes: SiteCodes) -> sparse.csc_array:
    """`[tokens, n_features]` float32: the codes that are above 0, 8 bytes each; tokens of a feature ascend."""
    tokens, slots = np.nonzero(np.asarray(codes.values) > 0)
    values = np.asarray(codes.values[tokens, slots], np.float32)
    features = np.asarray(codes.indices[tokens, slots], np.int32)
    return _columns(values, tokens, features, (len(codes), codes.n_features))


def hidden_columns(connector: Any, params: Any, inputs: SiteCodes, units: np.ndarray | None = None) -> sparse.csc_array:
    """`[tokens, units]` float32: activations of hidden units that are above 0, 8 bytes each.

    A unit of a ReLU network may fire on half of all tokens: of 2,048 such units and 200,000 tokens ask for some at a
    time.

    Args:
        connector, params: `connector.hidden(params, SparseCodes)` gives `[rows, width]`.
        inputs: codes of the connector's inputs.
        units: which; None: all.

    Raises:
        InputError: numbers that are none of the units.
    """
    units = None if units is None else np.asarray(units, np.int32)
    parts, width = [], None
    for start in range(0, len(inputs), _ROWS):
        codes = inputs.at(slice(start, start + _ROWS))
        n = len(codes.values)
        codes = SparseCodes(*(jnp.array(np.pad(each, ((0, _ROWS - n), (0, 0)))) for each in codes))
        if width is None:
            width = jax.eval_shape(partial(connector.hidden, params), codes).shape[1]
            if units is not None and len(units) and not 0 <= units.min() <= units.max() < width:
                raise InputError(f"hidden units {units.min()} to {units.max()}: there are 0 to {width - 1}")
        found = np.asarray(_hidden(connector, params, codes, None if units is None else jnp.array(units)))[:n]
        tokens, numbers = np.nonzero(found > 0)
        parts.append((found[tokens, numbers].astype(np.float32), tokens + start, numbers))
    n_units = (width or 0) if units is None else len(units)
    values, tokens, numbers = (np.concatenate(each) for each in zip(*parts)) if parts else (np.zeros(0),) * 3
    return _columns(values, tokens, numbers, (len(inputs), n_units))


@partial(jax.jit, static_argnames=("connector",))
def _hidden(connector, params, codes, units):
    found = connector.hidden(params, codes)
    return found if units is None else found[:, units]


def _columns(values, tokens, features, shape) -> sparse.csc_array:
    """Entries in the order of their tokens, gathered by feature; `tokens` ascend."""
    starts = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(tokens, minlength=shape[0]), out=starts[1:])
    # int32 numbers halve the memory; scipy wants one type of both.
    kind = np.int32 if len(values) < 2**31 else np.int64
    return sparse.csr_array((values, features.astype(kind), starts.astype(kind)), shape=shape).tocsc()
