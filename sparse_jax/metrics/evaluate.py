"""One pass over held-out text that measures dictionaries, floors and the ablations on the same tokens."""

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.reconstruction import (
    ReconstructionSums,
    explained_variance,
    fvu,
    reconstruction_sums,
    shrinkage,
)
from sparse_jax.metrics.sparsity import SparsitySums, density_shares, l0, l1, sparsity_sums
from sparse_jax.metrics.splice import SpliceSums, ce_recovered, clean_predictions, resume_with, splice_sums


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["encode", "decode"])
@dataclass(frozen=True)
class Reconstructor:
    """Something that rewrites activations, as two pure functions and their parameters.

    Attributes:
        encode: (params, x `[tokens, d]`, token ids `[tokens]`) -> codes `[tokens, n]`.
        decode: (params, codes, x, token ids) -> (x_hat `[tokens, d]`, lengths `[n]` of the features' raw directions).
        params: arrays.
    """

    encode: Callable[..., jax.Array]
    decode: Callable[..., tuple[jax.Array, jax.Array]]
    params: Any


class VariantSums(NamedTuple):
    """Everything added up for one reconstructor; sparsity is None for plain ablations."""

    reconstruction: ReconstructionSums
    sparsity: SparsitySums | None
    splice: SpliceSums


class MaskSums(NamedTuple):
    """Tokens by what the mask makes of them, and how much of the variance the dropped ones hold.

    Attributes:
        tokens: real tokens (not padding).
        dropped_by_text: padding excluded; separators and first positions.
        dropped_by_norm: dropped for their norm alone.
        outliers: tokens whose norm exceeds the outlier limit, dropped or not.
        outliers_kept: those among them that count all the same.
        dropped_spread: sum of ||x - shift||^2 over dropped tokens.
        spread: the same over all tokens.
    """

    tokens: jax.Array
    dropped_by_text: jax.Array
    dropped_by_norm: jax.Array
    outliers: jax.Array
    outliers_kept: jax.Array
    dropped_spread: jax.Array
    spread: jax.Array


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        figures: the dictionary's figures, by name.
        floors: floor -> its figures.
        unmasked: the dictionary's figures with nothing masked but padding, on every fourth batch.
        mask: what the mask dropped.
        fired: `[n_features]` on how many evaluation tokens each feature fired.
    """

    figures: dict[str, float]
    floors: dict[str, dict[str, float]]
    unmasked: dict[str, float]
    mask: dict[str, float]
    fired: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What `evaluate_each` returns.

    Attributes:
        figures: reconstructor -> its figures, by name.
        unmasked: for those that were asked for, the same with nothing masked but padding, on every fourth batch.
        mask: what the mask dropped.
        fired: reconstructor -> `[n_features]` on how many evaluation tokens each feature fired.
    """

    figures: dict[Hashable, dict[str, float]]
    unmasked: dict[Hashable, dict[str, float]]
    mask: dict[str, float]
    fired: dict[Hashable, np.ndarray]


class EvalBatch(NamedTuple):
    """Rows of text: `tokens`, `targets`, `mask`, each `[rows, position]`; empty rows have targets -1 throughout."""

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array


@dataclass(frozen=True)
class Setting:
    """Where and how the measuring is done; static.

    Attributes:
        site: where activations are replaced.
        drop_outliers: whether tokens above the outlier limit are masked.
        edits_for: edits that the model runs under, from the batch's token ids; their sites lie below or at `site`.
    """

    site: Site
    drop_outliers: bool = False
    edits_for: Callable[[jax.Array], Iterable[Edit]] | None = None


def _add(totals, sums):
    """Batch sums (float32, int32) added to host totals (float64, int64)."""

    def wide(value):
        value = np.asarray(value)
        return value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64)

    sums = jax.tree.map(wide, sums)
    return sums if totals is None else jax.tree.map(np.add, totals, sums)


# The figures without the mask are a check beside the others: they rest on one batch in this many.
UNMASKED_EVERY = 4


@partial(jax.jit, static_argnames=("setting", "unmasked", "references"))
def _batch_sums(
    lm, setting: Setting, batch: EvalBatch, reconstructors: tuple[Reconstructor, ...], mean, outlier_norm,
    unmasked: tuple[bool, ...], references: tuple[str, ...],
):  # fmt: skip
    """Sums of every variant over one batch; the splices share one program for the layers above the site.

    Args:
        unmasked: for each reconstructor, whether it is measured without the mask too.
        references: under which masks ("masked", "all") the clean and the ablated runs are measured. Those are the same
            for all reconstructors of a batch: none, where they have been measured with others.
    """
    site, real = setting.site, batch.targets >= 0
    edits = tuple(setting.edits_for(batch.tokens)) if setting.edits_for else ()
    entry = Site("resid_pre", site.layer)
    below = forward(lm, batch.tokens, capture=[entry, site], edits=edits, stop=site.layer + 1)
    residual, x = below.captured[str(entry)], below.captured[str(site)]
    x = x.reshape(*batch.tokens.shape, -1).astype(jnp.float32)
    flat, tokens = x.reshape(-1, x.shape[-1]), batch.tokens.reshape(-1)
    outlier = (jnp.sum(x * x, axis=-1) > outlier_norm**2) & real
    counted = batch.mask & real & ~(outlier & setting.drop_outliers)

    clean_logits = resume_with(lm, residual, site, x, x, real, edits)
    clean = clean_predictions(clean_logits)
    masks = {"masked": counted, "all": real}
    ablations = {"zero": jnp.zeros_like(flat), "mean": jnp.broadcast_to(mean, flat.shape)}
    # (name or number, mask) -> (x_hat, sparsity, where it replaces and what is averaged)
    variants = {(name, mask): (ablations[name], None, masks[mask]) for mask in references for name in ablations}
    for number, rebuild in enumerate(reconstructors):
        codes = rebuild.encode(rebuild.params, flat, tokens)
        x_hat, lengths = rebuild.decode(rebuild.params, codes, flat, tokens)
        variants[number, "masked"] = (x_hat, (codes, lengths), counted)
        if unmasked[number]:
            variants[number, "all"] = (x_hat, (codes, lengths), real)

    def spliced(inputs):
        value, where = inputs
        logits = resume_with(lm, residual, site, x, value.reshape(x.shape), where, edits)
        return splice_sums(clean, logits, batch.targets, where)

    values = jnp.stack([x_hat for x_hat, _, _ in variants.values()])
    splices = lax.map(spliced, (values, jnp.stack([where for _, _, where in variants.values()])))
    sums = {}
    for i, (variant, (x_hat, coded, where)) in enumerate(variants.items()):
        weight = where.reshape(-1).astype(jnp.float32)
        sparsity = sparsity_sums(coded[0], weight, coded[1]) if coded else None
        splice = jax.tree.map(lambda stacked, i=i: stacked[i], splices)
        sums[variant] = VariantSums(reconstruction_sums(flat, x_hat, weight, mean), sparsity, splice)
    clean_ce = {name: splice_sums(clean, clean_logits, batch.targets, masks[name]) for name in references}
    spread = jnp.sum((x - mean) ** 2, axis=-1)
    mask = MaskSums(
        tokens=jnp.sum(real, dtype=jnp.int32),
        dropped_by_text=jnp.sum(real & ~batch.mask, dtype=jnp.int32),
        dropped_by_norm=jnp.sum(real & batch.mask & ~counted, dtype=jnp.int32),
        outliers=jnp.sum(outlier, dtype=jnp.int32),
        outliers_kept=jnp.sum(outlier & counted, dtype=jnp.int32),
        dropped_spread=jnp.sum(jnp.where(real & ~counted, spread, 0)),
        spread=jnp.sum(jnp.where(real, spread, 0)),
    )
    # A list, in the order of the variants: keys of a tree must sort, and strings and numbers do not.
    return list(sums.values()), clean_ce, mask, jnp.all(jnp.isfinite(x) | ~real[..., None])


def _figures(sums: VariantSums, clean: SpliceSums, zero: SpliceSums, mean: SpliceSums) -> dict[str, float]:
    """Named figures of one reconstructor, from its sums and those of the clean and ablated runs."""
    ce = {name: float(s.ce) / float(s.predictions) for name, s in (("clean", clean), ("zero", zero), ("mean", mean))}
    spliced = float(sums.splice.ce) / float(sums.splice.predictions)
    return {
        "fvu": fvu(sums.reconstruction),
        "explained_variance": explained_variance(sums.reconstruction),
        "l0": l0(sums.sparsity),
        "l1": l1(sums.sparsity),
        "ce_clean": ce["clean"],
        "ce_spliced": spliced,
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "ce_increase": spliced - ce["clean"],
        "ce_recovered": ce_recovered(ce["clean"], spliced, ce["zero"]),
        "ce_recovered_mean": ce_recovered(ce["clean"], spliced, ce["mean"]),
        "kl": float(sums.splice.kl) / float(sums.splice.predictions),
        "perplexity_clean": float(np.exp(ce["clean"])),
        "perplexity_spliced": float(np.exp(spliced)),
        "perplexity_increase": float(np.exp(spliced) - np.exp(ce["clean"])),
        "shrinkage": shrinkage(sums.reconstruction),
        "tokens_evaluated": int(sums.reconstruction.tokens),
        **density_shares(sums.sparsity),
    }


def evaluate(
    lm: LanguageModel,
    setting: Setting,
    batches: Iterable[EvalBatch],
    reconstructors: dict[str, Reconstructor],
    *,
    mean: np.ndarray,
    outlier_norm: float,
) -> Evaluation:
    """Measure the reconstructor called "dictionary" and, as floors, all others, on the same tokens.

    Args:
        lm: the model.
        setting: site and mask.
        batches: held-out rows, all of one shape.
        reconstructors: "dictionary" and any floors.
        mean: `[d]` mean of training activations: what mean-ablation puts in.
        outlier_norm: norm above which a token is an outlier.

    Raises:
        InputError: there is no batch, no token counts, or an activation is not finite.
    """
    measured = evaluate_each(
        lm, setting, batches, reconstructors, mean=mean, outlier_norm=outlier_norm, unmasked=("dictionary",)
    )
    floors = {name: figures for name, figures in measured.figures.items() if name != "dictionary"}
    main, unmasked = measured.figures["dictionary"], measured.unmasked["dictionary"]
    return Evaluation(main, floors, unmasked, measured.mask, measured.fired["dictionary"])


def evaluate_each(
    lm: LanguageModel,
    setting: Setting,
    batches: Iterable[EvalBatch],
    reconstructors: dict[Hashable, Reconstructor],
    *,
    mean: np.ndarray,
    outlier_norm: float,
    unmasked: Collection[Hashable] = (),
    at_once: int | None = None,
) -> Measured:
    """Measure many reconstructors on the same tokens, in one pass over the text.

    Args:
        lm: the model.
        setting: site and mask.
        batches: held-out rows, all of one shape.
        reconstructors: by name.
        mean: `[d]` mean of training activations: what mean-ablation puts in.
        outlier_norm: norm above which a token is an outlier.
        unmasked: the names of those that are measured without the mask too.
        at_once: how many are computed together, so that their codes fit in memory: `[tokens, n_features]` float32
            each. The layers below the site and the clean run are computed once for each such part of a batch. None:
            all together.

    Raises:
        InputError: there is no batch, no token counts, an activation is not finite, or nothing is to be measured.
    """
    if not reconstructors or (at_once is not None and at_once < 1):
        raise InputError(f"{len(reconstructors)} reconstructors to measure, {at_once} at once: give at least one each")
    device_mean, limit = jnp.array(mean, jnp.float32), jnp.array(outlier_norm, jnp.float32)
    names = list(reconstructors)
    parts = [names[i : i + (at_once or len(names))] for i in range(0, len(names), at_once or len(names))]
    sums, clean, mask = {}, {}, None
    for number, batch in enumerate(batches):
        masks = ("masked", "all") if unmasked and number % UNMASKED_EVERY == 0 else ("masked",)
        for part in parts:
            also = tuple("all" in masks and name in unmasked for name in part)
            references = masks if part is parts[0] else ()
            several = tuple(reconstructors[name] for name in part)
            more, more_clean, more_mask, finite = _batch_sums(
                lm, setting, batch, several, device_mean, limit, also, references
            )
            if not bool(finite):
                raise InputError(f"an activation at {setting.site} is not finite in evaluation batch {number}")
            keys = [("ablated", name, which) for which in references for name in ("zero", "mean")]
            for name, twice in zip(part, also):
                keys += [(name, which) for which in (("masked", "all") if twice else ("masked",))]
            sums |= {key: _add(sums.get(key), value) for key, value in zip(keys, more, strict=True)}
            if references:
                clean |= {name: _add(clean.get(name), value) for name, value in more_clean.items()}
                mask = _add(mask, more_mask)
    if mask is None or sums[names[0], "masked"].reconstruction.tokens == 0:
        raise InputError("no evaluation token counts: the evaluation text is empty or the mask drops all of it")

    def figures(name: Hashable, which: str) -> dict[str, float]:
        zero, mean = (sums["ablated", kind, which].splice for kind in ("zero", "mean"))
        return _figures(sums[name, which], clean[which], zero, mean)

    dropped = {
        "tokens": int(mask.tokens),
        "dropped": int(mask.dropped_by_text + mask.dropped_by_norm),
        "dropped_by_norm": int(mask.dropped_by_norm),
        "dropped_share_of_variance": float(mask.dropped_spread / mask.spread),
        "outliers": int(mask.outliers),
        "outliers_kept": int(mask.outliers_kept),
        "outlier_norm": float(outlier_norm),
    }
    return Measured(
        figures={name: figures(name, "masked") for name in names},
        unmasked={name: figures(name, "all") for name in names if name in unmasked},
        mask=dropped,
        fired={name: sums[name, "masked"].sparsity.fired for name in names},
    )
