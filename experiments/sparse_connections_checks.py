"""Whether sparse connections hold in the model: spliced, causal, and beside weights that were not learned."""

import numpy as np

from experiments.connecting import Ends, Opened
from experiments.connecting_codes import Sides, spread_rows
from experiments.connecting_fits import scales_of_targets
from experiments.sparse_connections import Flags
from sparse_jax.connectors.between import Between, between
from sparse_jax.connectors.causal import causal_check, checked_columns
from sparse_jax.connectors.causal_figures import causal_figures
from sparse_jax.connectors.connection_sample import maximum_codes, sample_connections
from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.mean_jacobian import MeanJacobians, mean_jacobians
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.spliced import connected, rebuilt, spliced_figures, spliced_losses
from sparse_jax.connectors.virtual_weights import attention_weights, likeness, mlp_weights, stream_weights
from sparse_jax.errors import InputError
from sparse_jax.lm.rows import RowBatch

# Rows that are spliced at once: their logits must fit in memory.
_ROWS = 8


def spliced_figures_of(
    flags: Flags, opened: Opened, ends: Ends, connectors: dict[str, Trained], numbers: np.ndarray
) -> dict:
    """Name of what stands in for the site -> its figures, with intervals over documents."""
    coders, target = [opened.coders[site] for site in ends.inputs], opened.coders[ends.target]
    several = {} if target is None else {"reconstruction": rebuilt(target)}
    several |= {
        name: connected(trained, coders, target, non_negative=flags.non_negative and target is not None)
        for name, trained in connectors.items()
    }
    text = opened.data.evaluation
    found = spliced_losses(
        opened.data.lm, ends.inputs, ends.target, batches(text, numbers, flags.splice_tokens), several,
        mean=opened.mean(ends.target), max_norms=opened.max_norms(*ends.inputs, ends.target),
    )  # fmt: skip
    predictions = int(found.predictions.sum())
    clean = float(found.ce["clean"].sum()) / predictions
    return {"predictions": predictions, "ce_clean": clean, "rows": spliced_figures(found)}


def batches(text, numbers: np.ndarray, tokens: int) -> list[RowBatch]:
    """Held-out rows, evenly from all, in batches of one shape; the last is filled up with empty rows."""
    numbers = spread_rows(numbers, tokens // text.context)
    padded = np.concatenate([numbers, np.full(-len(numbers) % _ROWS, -1, np.int64)])
    return [text[part] for part in padded.reshape(-1, _ROWS)]


def between_ends(opened: Opened, ends: Ends) -> Between | None:
    """The part of the layer between the ends; None where none stands there alone."""
    try:
        return between(opened.data.lm.config, ends.inputs, ends.target)
    except InputError:
        return None


def causal_figures_of(flags: Flags, opened: Opened, ends: Ends, sides: Sides, sparse: Trained, problem) -> dict | None:
    """Norm -> places -> agreement of connections and controls; None where no part of a layer stands between."""
    weights = np.asarray(sparse.weights())
    if between_ends(opened, ends) is None or not weights.any():
        return None
    sample = sample_connections(sides.held_out, weights, flags.checks, flags.seed)
    made = causal_check(
        opened.data.lm, opened.data.evaluation, [opened.located(site) for site in ends.inputs],
        opened.located(ends.target), sides.held_out, sparse, weights, sample,
        set_to=None if flags.set_to == "zero" else maximum_codes(sides.held_out.inputs),
        target_scale=scales_of_targets(problem), seed=flags.seed,
    )  # fmt: skip
    found: dict = {"sampled": len(sample.token), "set_to": flags.set_to}
    for (norm, places), pair in causal_figures(made).items():
        found.setdefault(norm, {})[places] = dict(zip(("connections", "controls"), pair))
    return found


def check_encoders(opened: Opened) -> None:
    """Raises InputError where a target has no pre-activations that a check could look at."""
    for ends in opened.ends:
        if between_ends(opened, ends) is not None:
            try:
                checked_columns(opened.data.lm, opened.located(ends.target))
            except InputError as error:
                raise InputError(f"{error}; give --checks 0 --no-weights and no --jacobian-support") from error


def has_jacobians(part: Between | None) -> bool:
    """Whether mean Jacobians in closed form are those of this part: of an MLP."""
    return part is not None and part.part == "mlp" and part.source.name != "mlp_hidden" and part.target.name != "mlp_in"


def check_jacobians(opened: Opened) -> None:
    """Raises InputError where no MLP alone stands between the ends of a connection."""
    for ends in opened.ends:
        if not has_jacobians(between_ends(opened, ends)):
            raise InputError(
                f"--jacobian-support and {ends.name}: mean Jacobians are those of an MLP; go from resid_pre, resid_mid "
                "or mlp_in to mlp_out of one layer, or leave it out"
            )


def mean_jacobian_of(opened: Opened, ends: Ends, pair: Pair, tokens: int) -> MeanJacobians:
    """Of an MLP over some tokens of the training text: of rows evenly from all."""
    rows = np.unique(pair.tokens.row)
    kept = np.isin(pair.tokens.row, spread_rows(rows, max(1, tokens // opened.data.train.context)))
    pair = pair.at(np.flatnonzero(kept))
    located = opened.located(ends.inputs[0]), opened.located(ends.target)
    return mean_jacobians(opened.data.lm, opened.data.train, *located, pair.tokens, pair.inputs)


def weights_figures(opened: Opened, ends: Ends, sides: Sides, sparse: Trained) -> dict | None:
    """Likeness of the learned weights with others by name; None where there are none to compare with."""
    part, learned = between_ends(opened, ends), np.asarray(sparse.weights())
    if part is None or not learned.any():
        return None
    return {name: likeness(learned, np.asarray(each)) for name, each in others(opened, ends, sides, part)}


def others(opened: Opened, ends: Ends, sides: Sides, part: Between):
    """(name, weights `[n_in, n_out]`) of each kind that this part has."""
    lm, target = opened.data.lm, opened.located(ends.target)
    inputs = [opened.located(site) for site in ends.inputs]
    if has_jacobians(part):
        yield "virtual weights, MLP at zero", mlp_weights(lm, inputs[0], target)
        yield (
            "virtual weights, MLP at the mean",
            mlp_weights(lm, inputs[0], target, np.asarray(opened.mean(str(part.source)), np.float32)),
        )
        held = sides.held_out
        made = mean_jacobians(lm, opened.data.evaluation, inputs[0], target, held.tokens, held.inputs)
        yield "mean Jacobian where the input fires", made.firing
        yield "the same, norm frozen", made.firing_frozen
        yield "mean Jacobian over all tokens", made.everywhere
    elif part.part in ("stream", "block"):
        each = [np.asarray(stream_weights(lm, one, target)) for one in inputs]
        yield "virtual weights of the stream", np.concatenate(each)
    elif part.part == "attention" and part.target.name == "attn_out":
        heads = range(lm.config.n_heads)
        yield (
            "virtual weights, all heads at their own place",
            sum(np.asarray(attention_weights(lm, inputs[0], target, head)) for head in heads),
        )
