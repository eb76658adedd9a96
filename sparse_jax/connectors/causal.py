"""Do connections say what happens when an input feature is changed? One input, one target, one place at a time.

    predicted = prediction(codes with c_i := v)_j - prediction(codes)_j          (v - c_i) W_ij of a linear connector
    measured  = pre_j(part(x + (v - c_i) d_i)) - pre_j(part(x))                  the part of the layer run alone

With v = 0 the input feature is removed; x is the actual activation, so all that the dictionary does not explain stays
(the error is kept). Only the part of the layer between the two sites is run (`between`), once with its layer norm live
and once with the norm's denominator as it was. pre_j is the target's pre-activation, the encoder's linear map of the
raw activation, in units of the target's codes: a change is there even where the threshold hides it.

Beside each connection stands a control: the same input at the same place, and a target without a weight from it that is
as often active. Its measured change is set against the prediction for the connection: what a connector says must hold
for the target it says it of, and for no other.

Source: Cunningham et al. 2023, section 5.3 (ablating earlier features); Marks et al. 2024 (the error is kept).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.between import Between, Clean, between, changes, clean_pass
from sparse_jax.connectors.connection_sample import Sample, code_at, matched_targets
from sparse_jax.connectors.paired_codes import Pair, Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.causes import _LINEAR_ENCODERS, Located, encoder_columns
from sparse_jax.lm.model import LanguageModel, site_width
from sparse_jax.lm.rows import Rows
from sparse_jax.numerics.sparse_codes import SparseCodes


class Predictor(Protocol):
    """What predicts target codes, as a pytree (`connector.Trained`)."""

    def predict(self, x: SparseCodes) -> jax.Array: ...


@dataclass(frozen=True, eq=False)
class CausalCheck:
    """Predicted and measured changes of each of a sample of connections. Numpy, `[n]`.

    Attributes:
        sample: which.
        document: int32 number of the document of each.
        change: float32 of the input's code, v - c.
        target_active: bool, whether the target is active at the place.
        predicted: float32, change of the target's code by the connector.
        live, frozen: float32, measured change of its pre-activation, by layer norm; equal where none stands between.
        control: int32, the other target; -1 where there is none.
        control_live, control_frozen: float32, its measured change; NaN where there is none.
        target_scale: `[n]` float32 scale of the target's codes, by which `causal_figures` divides; 1 if none was given.
        control_scale: `[n]` the control's; 1 where there is none.
    """

    sample: Sample
    document: np.ndarray
    change: np.ndarray
    target_active: np.ndarray
    predicted: np.ndarray
    live: np.ndarray
    frozen: np.ndarray
    control: np.ndarray
    control_live: np.ndarray
    control_frozen: np.ndarray
    target_scale: np.ndarray
    control_scale: np.ndarray


def causal_check(
    lm: LanguageModel,
    rows: Rows,
    inputs: Sequence[Located],
    target: Located,
    pair: Pair,
    connector: Predictor,
    weights: np.ndarray,
    sample: Sample,
    *,
    set_to: np.ndarray | None = None,
    target_scale: np.ndarray | None = None,
    both_active: bool = False,
    seed: int = 0,
    block_rows: int = 8,
    batch: int = 256,
) -> CausalCheck:
    """Predicted and measured changes of each connection of a sample, and of its control.

    Memory on the device: of `block_rows` rows the source's activations and, where attention stands between, keys and
    values of one layer; and `batch x context` of these again. Each row that holds a place of the sample is run up to
    the layer.

    Args:
        lm: the model.
        rows: the text that the pair's tokens stand in.
        inputs: sites and dictionaries of the pair's inputs, in their order; `coder` None is the raw site.
        target: those of its targets.
        pair: codes; those of the inputs at the places are what is removed.
        connector: predicts the targets' codes.
        weights: `[n_in, n_out]`, 0 where there is no connection: for the controls.
        sample: what `sample_connections` gave.
        set_to: `[n_in]` the code that each input is set to (`maximum_codes`, say); None: 0, it is removed.
        target_scale: `[n_out]` scales of the targets' codes; None: 1.
        both_active: controls are active at the place too.
        seed: decides the controls.
        block_rows: rows of text that are run at once.
        batch: places that are changed at once.

    Raises:
        InputError: sites between which no part of a layer stands, widths that do not fit, a target without
            pre-activations.
    """
    part = _checked(lm, inputs, target, pair)
    weights = np.asarray(weights)
    control = matched_targets(pair, weights, sample, seed, both_active=both_active)
    code = code_at(pair.inputs, sample.token, sample.input)
    change = -code if set_to is None else np.asarray(set_to, np.float32)[sample.input] - code
    predicted = predicted_changes(connector, pair, sample, change, batch=batch)
    pairs = np.stack([sample.target, np.maximum(control, 0)], axis=1)
    live, frozen = measured_changes(
        lm, rows, part, inputs, target, pair.tokens.at(sample.token), sample.input, change, pairs,
        block_rows=block_rows, batch=batch,
    )  # fmt: skip
    scale = np.ones(pair.targets.n_features, np.float32) if target_scale is None else np.asarray(target_scale)
    none = control < 0
    return CausalCheck(
        sample, pair.tokens.document[sample.token], change,
        code_at(pair.targets, sample.token, sample.target) > 0, predicted, live[:, 0], frozen[:, 0], control,
        np.where(none, np.float32(np.nan), live[:, 1]), np.where(none, np.float32(np.nan), frozen[:, 1]),
        scale[sample.target].astype(np.float32), np.where(none, 1, scale[control]).astype(np.float32),
    )  # fmt: skip


def predicted_changes(
    connector: Predictor, pair: Pair, sample: Sample, change: np.ndarray, *, batch: int = 256
) -> np.ndarray:
    """`[n]` float32: the change of each target's predicted code when `change [n]` is added to the input's code."""
    found = []
    for begin in range(0, len(sample.token), batch):
        which = np.minimum(np.arange(begin, begin + batch), len(sample.token) - 1)
        codes = SparseCodes(*map(jnp.array, pair.inputs.at(sample.token[which])))
        given = (jnp.array(part[which]) for part in (sample.input, change, sample.target))
        found.append(np.asarray(_predicted(connector, codes, *given)))
    return np.concatenate(found)[: len(sample.token)]


@jax.jit
def _predicted(connector, codes, feature, change, target):
    # The new code gets a slot of its own: the feature may have had none.
    here = codes.indices == feature[:, None]
    old = jnp.sum(jnp.where(here, codes.values, 0), axis=1)
    new = old + change.astype(old.dtype)

    def with_code(value):
        values = jnp.concatenate([jnp.where(here, 0, codes.values), value[:, None]], axis=1)
        indices = jnp.concatenate([codes.indices, feature[:, None].astype(codes.indices.dtype)], axis=1)
        predicted = connector.predict(SparseCodes(values, indices))
        return jnp.take_along_axis(predicted, target[:, None], axis=1)[:, 0]

    return with_code(new) - with_code(old)


def measured_changes(
    lm: LanguageModel,
    rows: Rows,
    part: Between,
    inputs: Sequence[Located],
    target: Located,
    tokens: Tokens,
    feature: np.ndarray,
    change: np.ndarray,
    targets: np.ndarray,
    *,
    block_rows: int = 8,
    batch: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """`[n, k]` float32 twice: change of the targets' pre-activations, layer norm live and frozen.

    Args:
        lm, rows, inputs, target, block_rows, batch: as in `causal_check`.
        part: what stands between.
        tokens: `[n]` places.
        feature, change: `[n]` which input's code is changed there, by how much.
        targets: `[n, k]` which targets are looked at.
    """
    directions = jnp.concatenate([checked_directions(lm, located) for located in inputs])
    columns = checked_columns(lm, target).T
    live, frozen = np.zeros((2, *targets.shape), np.float32)
    numbers, inverse = np.unique(tokens.row, return_inverse=True)
    waiting = []
    for begin in range(0, len(numbers), block_rows):
        block = np.pad(numbers[begin : begin + block_rows], (0, max(0, begin + block_rows - len(numbers))), mode="edge")
        clean = _clean(lm, part, jnp.array(rows[block].tokens))
        inside = np.flatnonzero((inverse >= begin) & (inverse < begin + block_rows))
        for first in range(0, len(inside), batch):
            which = inside[np.minimum(np.arange(first, first + batch), len(inside) - 1)]
            places = (inverse[which] - begin).astype(np.int32), tokens.position[which].astype(np.int32)
            chosen = (jnp.array(given[which]) for given in (feature, change, targets))
            found = _measured(lm, part, clean, directions, columns, *map(jnp.array, places), *chosen)
            waiting.append((which, found))
    for which, found in waiting:  # what fills a batch up is its last place again: the same value
        live[which], frozen[which] = map(np.asarray, found)
    return live, frozen


@partial(jax.jit, static_argnames=("part",))
def _clean(lm, part, tokens) -> Clean:
    return clean_pass(lm, part, tokens)


@partial(jax.jit, static_argnames=("part",))
def _measured(lm, part, clean, directions, columns, rows, positions, feature, change, targets):
    added = change.astype(directions.dtype)[:, None] * directions[feature]
    moved = changes(lm, part, clean, rows, positions, added)
    return tuple(jnp.einsum("bd,bkd->bk", m, columns[targets].astype(m.dtype)) for m in moved)


def _checked(lm, inputs, target, pair) -> Between:
    part = between(lm.config, [site for site, _ in inputs], target.site)
    sizes = [checked_directions(lm, located).shape[0] for located in inputs]
    if sum(sizes) != pair.inputs.n_features:
        raise InputError(f"dictionaries of {sizes} features for a pair of {pair.inputs.n_features} inputs")
    if (n := checked_columns(lm, target).shape[1]) != pair.targets.n_features:
        raise InputError(f"a dictionary of {n} features for a pair of {pair.targets.n_features} targets")
    return part


def checked_directions(lm, located: Located) -> jax.Array:
    """`[n_features, width]` in raw units; of a raw site its axes."""
    width = site_width(lm.config, located.site)
    directions = jnp.eye(width) if located.coder is None else located.coder.directions()
    return _of_width(directions, directions.shape[1], width, located.site)


def checked_columns(lm, located: Located) -> jax.Array:
    """`[width, n_features]` the encoder's linear map of raw activations; of a raw site its axes."""
    width = site_width(lm.config, located.site)
    if located.coder is not None and located.coder.dictionary.kind not in _LINEAR_ENCODERS:
        raise InputError(f"a {located.coder.dictionary.kind} dictionary has no pre-activations to compare with")
    columns = jnp.eye(width) if located.coder is None else encoder_columns(located.coder)
    return _of_width(columns, columns.shape[0], width, located.site)


def _of_width(array, width, expected, site):
    if width != expected:
        raise InputError(f"the dictionary has {width} numbers, site {site} has {expected}")
    return array
