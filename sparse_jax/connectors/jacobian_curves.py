"""How sparse the Jacobian of a pair of dictionaries around an MLP is, and what the pair costs: one pass over text.

    figures = jacobian_figures(lm, 3, (coder_in, coder_out), rows, numbers)
    figures.share_above(0.01), figures.share_above(0.01, relative=True), figures.fvu_in, figures.ce_increase["both"]

The pair may be any two TopK dictionaries of `mlp_in` and `mlp_out`, trained with a penalty or apart: only their codes
and weights are used. Entries are those between features that are active on a token, k x k of them; J is in the units
of the codes (normalised activations). Two ways to count those that matter, both the paper's:

    |J| > t                 as they are (the authors' evaluation has t = 0.005 and 0.01)
    |J| > t x mean norm     over the mean, over tokens, of the Frobenius norm of J (`relative`)

The second does not see the scale of J: a penalty could shrink J as a whole and win nothing, and models with random
weights have other slopes. Trained and random models are compared by it. `concentration` needs no threshold: the mean
over tokens of ||J||_1 / (||J||_2 k), 1 where all entries are equal and 1 / k where one is alone.

Source: Farnik et al. 2025 (ICML), section 5 and the authors' `evals.py` and `histogram.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.folded_mlp import FoldedMlp, folded_mlp
from sparse_jax.connectors.jacobian import Active, active, jacobian, tables
from sparse_jax.connectors.jacobian_sae import At
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.topk import KSparse
from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit, at
from sparse_jax.lm.interventions import reconstruct
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.reconstruction import ReconstructionSums, fvu, reconstruction_sums
from sparse_jax.metrics.splice import SpliceSums, clean_predictions, splice_sums
from sparse_jax.numerics.sparse_codes import top_k_codes

# Edges of the histogram of |J|: so many bins in each factor of ten.
EDGES = np.concatenate([[0.0], np.logspace(-8, 4, 12 * 40 + 1), [np.inf]])
# Rows of text that go through the model at once.
ROWS_AT_ONCE = 8
# A table [n_out, n_in] of mean slopes is kept up to so many entries (float64 on the host).
TABLE_ENTRIES = 1 << 26
SPLICES = ("input", "output", "both")


class _Sums(NamedTuple):
    counts: jax.Array
    norm: jax.Array
    ratio: jax.Array
    absolute: jax.Array
    tokens: jax.Array
    fired_in: jax.Array
    fired_out: jax.Array
    table: jax.Array | None
    inputs: ReconstructionSums
    outputs: ReconstructionSums
    splices: dict[str, SpliceSums]


@dataclass(frozen=True, eq=False)
class JacobianFigures:
    """What `jacobian_figures` measures.

    Attributes:
        tokens: that counted.
        k: slots on each side: entries of a token are counted out of k^2, empty slots being entries of 0.
        counts: `[bins]` int64 entries by |J|, between EDGES; exact zeros are in the first.
        mean_norm: mean over tokens of the Frobenius norm of J.
        mean_absolute: mean |J| over all k^2 entries: the penalty that training sees.
        concentration: mean over tokens of ||J||_1 / (||J||_2 k).
        fvu_in, fvu_out: of each dictionary on the model's own activations.
        fired_in, fired_out: `[n]` int64 tokens on which each feature is active.
        ce_clean: nats.
        ce_increase: "input", "output", "both" (the MLP runs on the reconstructed input, and what comes out is
            reconstructed) -> nats more with these replaced where tokens count.
        mean_slopes: `[n_out, n_in]` float64 sum of |J| over tokens on which both are active, over the tokens on which
            the output is active; None where the table would be too large.
    """

    tokens: int
    k: int
    counts: np.ndarray
    mean_norm: float
    mean_absolute: float
    concentration: float
    fvu_in: float
    fvu_out: float
    fired_in: np.ndarray
    fired_out: np.ndarray
    ce_clean: float
    ce_increase: dict[str, float]
    mean_slopes: np.ndarray | None

    def share_above(self, threshold: float, relative: bool = False) -> float:
        """The share of entries with |J| above a threshold, or above the threshold times the mean norm.

        Between the edges of a bin (6 % apart) counts are taken to lie evenly in the logarithm.
        """
        limit = threshold * (self.mean_norm if relative else 1.0)
        above = np.concatenate([np.cumsum(self.counts[::-1])[::-1], [0]])  # at or above each edge
        inner = slice(1, -1)
        return float(np.interp(np.log(max(limit, EDGES[1])), np.log(EDGES[inner]), above[inner])) / self.counts.sum()


def jacobian_figures(
    lm: LanguageModel,
    layer: int,
    coders: tuple[Normalised, Normalised],
    rows: Rows,
    numbers: np.ndarray,
    *,
    where: At = "reconstruction",
    max_norms: tuple[float, float] = (float("inf"), float("inf")),
) -> JacobianFigures:
    """Measure a pair of dictionaries of a layer's `mlp_in` and `mlp_out` on rows of text.

    Args:
        lm: the model, in float32.
        layer: whose MLP.
        coders: of the input and of the output; TopK.
        rows: text.
        numbers: `[rows]` which rows.
        where: at what input the MLP's slopes are taken.
        max_norms: a token whose activation has a larger norm at its site does not count.

    Memory: 8 rows' codes `[tokens, n]` on both sides and J `[tokens, k, k]`, the logits of the splices one at a time,
    and the table of mean slopes.

    Raises:
        InputError: dictionaries that are not TopK or do not fit the model; no token counts.
    """
    check_coders(lm, layer, coders)
    mlp = folded_mlp(lm, layer, coders[0].normaliser, coders[1].normaliser)
    n_in, n_out = (coder.dictionary.n_features for coder in coders)
    with_table = n_in * n_out <= TABLE_ENTRIES
    padded = np.concatenate([numbers, np.full(-len(numbers) % ROWS_AT_ONCE, -1, np.int64)])
    limits = tuple(jnp.array(norm, jnp.float32) for norm in max_norms)
    edges = jnp.array(EDGES[1:-1], jnp.float32)
    total = None
    for start in range(0, len(padded), ROWS_AT_ONCE):
        tokens, targets, mask, _ = rows[padded[start : start + ROWS_AT_ONCE]]
        sums = _batch_sums(
            lm, mlp, coders, jnp.array(tokens), jnp.array(targets), jnp.array(mask), edges, limits, layer, where,
            with_table,
        )  # fmt: skip
        wide = jax.tree.map(_wide, sums)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
    if total is None or not total.tokens:
        raise InputError("no token counts: the text is empty or the mask drops all of it")
    return _figures(total, coders[0].dictionary.k)


def check_coders(lm: LanguageModel, layer: int, coders: tuple[Normalised, Normalised]) -> None:
    """Raises InputError for coders that are no TopK dictionaries of one k, or not as wide as the model."""
    for name, coder in zip(("mlp_in", "mlp_out"), coders):
        dictionary = coder.dictionary
        if not isinstance(dictionary, KSparse) or not hasattr(dictionary, "preactivations"):
            raise InputError(f"the dictionary of {name} is {dictionary.kind}: a k x k Jacobian needs topk dictionaries")
        if dictionary.d_in != lm.config.d_model:
            raise InputError(
                f"the dictionary of {name} reads {dictionary.d_in} numbers, {name}.{layer} has {lm.config.d_model}"
            )
    if coders[0].dictionary.k != coders[1].dictionary.k:
        raise InputError(f"k {coders[0].dictionary.k} of mlp_in and {coders[1].dictionary.k} of mlp_out: give equal k")


def _wide(value):
    value = np.asarray(value)
    return value.astype(np.int64 if value.dtype.kind in "iu" else np.float64)


class Sandwich(NamedTuple):
    """What a pair makes of tokens.

    Attributes:
        codes_in, codes_out: `[tokens, n]` of the model's own activations.
        here: the active features.
        place: `[tokens, d]` normalised, where slopes are taken.
        J: `[tokens, k, k]`.
    """

    codes_in: jax.Array
    codes_out: jax.Array
    here: Active
    place: jax.Array
    J: jax.Array


def sandwich(mlp: FoldedMlp, coders: tuple[Normalised, Normalised], x: jax.Array, y: jax.Array, where: At) -> Sandwich:
    """Codes, active features and Jacobian for raw activations x and y `[tokens, d]`."""
    into, out = coders
    codes_in, codes_out = into.encode(x), out.encode(y)
    here = active(top_k_codes(codes_in, into.dictionary.k), top_k_codes(codes_out, out.dictionary.k))
    normalised = into.normaliser.apply(x)
    place = normalised if where == "input" else into.dictionary.decode(into.params, codes_in)
    shared = tables(into.params["W_dec"], out.params["W_enc"], mlp)
    return Sandwich(codes_in, codes_out, here, place, jacobian(shared, mlp.slopes(place), here))


@partial(jax.jit, static_argnames=("layer", "where", "with_table"))
def _batch_sums(lm, mlp, coders, tokens, targets, mask, edges, limits, layer, where, with_table) -> _Sums:
    sites = [Site(name, layer) for name in ("resid_pre", "mlp_in", "mlp_out")]
    found = forward(lm, tokens, capture=sites, stop=layer + 1).captured
    residual, x, y = (found[str(site)] for site in sites)
    counted = mask & (targets >= 0)
    for value, limit in zip((x, y), limits):
        counted = counted & (jnp.sum(value * value, axis=-1) <= limit**2)
    flat, weight = [value.reshape(-1, value.shape[-1]) for value in (x, y)], counted.reshape(-1).astype(jnp.float32)
    made = sandwich(mlp, coders, *flat, where)
    sizes = jnp.abs(made.J) * weight[:, None, None]
    l1, l2 = jnp.sum(sizes, axis=(1, 2)), jnp.sqrt(jnp.sum(sizes * sizes, axis=(1, 2)))
    k = coders[0].dictionary.k
    # Tokens that do not count give zeros, which are taken off again by their number.
    bins = jnp.searchsorted(edges, sizes.reshape(-1), side="right")
    counts = jnp.zeros(len(edges) + 1, jnp.int32).at[bins].add(1)
    counts = counts.at[0].add(-(k * k) * jnp.sum(weight == 0, dtype=jnp.int32))
    table = None
    if with_table:
        shape = [coder.dictionary.n_features for coder in coders]
        where_to = (made.here.outputs[:, :, None], made.here.inputs[:, None, :])
        table = jnp.zeros(shape[::-1], jnp.float32).at[where_to].add(sizes)
    fired = [jnp.sum((codes > 0) & (weight > 0)[:, None], axis=0, dtype=jnp.int32) for codes in made[:2]]
    rebuilt = [
        reconstruction_sums(value, coder.decode(codes), weight, coder.normaliser.centre)
        for value, coder, codes in zip(flat, coders, made[:2])
    ]
    return _Sums(
        counts, jnp.sum(l2), jnp.sum(jnp.where(l2 > 0, l1 / jnp.where(l2 > 0, l2, 1), 0)) / k, jnp.sum(l1),
        jnp.sum(weight > 0, dtype=jnp.int32), *fired, table, *rebuilt,
        _splices(lm, coders, residual, targets, counted, sites),
    )  # fmt: skip


def _splices(lm, coders, residual, targets, counted, sites) -> dict[str, SpliceSums]:
    """Losses of the clean run and with the input, the output, or both replaced."""
    layer = sites[0].layer
    where = at(mask=counted)
    edits = [Edit(site, reconstruct, (coder,), where) for site, coder in zip(sites[1:], coders)]
    clean_logits = forward(lm, residual, start=layer).logits
    clean = clean_predictions(clean_logits)
    made = {"clean": splice_sums(clean, clean_logits, targets, counted)}
    for name, chosen in zip(SPLICES, (edits[:1], edits[1:], edits)):
        logits = forward(lm, residual, start=layer, edits=chosen).logits
        made[name] = splice_sums(clean, logits, targets, counted)
    return made


def _figures(total: _Sums, k: int) -> JacobianFigures:
    ce = {name: float(sums.ce) / float(sums.predictions) for name, sums in total.splices.items()}
    tokens = int(total.tokens)
    table = total.table
    return JacobianFigures(
        tokens=tokens,
        k=k,
        counts=total.counts,
        mean_norm=float(total.norm) / tokens,
        mean_absolute=float(total.absolute) / (tokens * k * k),
        concentration=float(total.ratio) / tokens,
        fvu_in=fvu(total.inputs),
        fvu_out=fvu(total.outputs),
        fired_in=total.fired_in,
        fired_out=total.fired_out,
        ce_clean=ce["clean"],
        ce_increase={name: ce[name] - ce["clean"] for name in SPLICES},
        mean_slopes=None if table is None else table / np.maximum(total.fired_out, 1)[:, None],
    )
