"""Measuring many dictionaries on the same held-out text: what does not depend on the dictionary is computed once."""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measuring import in_float32
from sparse_jax.activations import activations
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, Site, check_site, load, load_tokenizer, resolve
from sparse_jax.lm.holdout import split
from sparse_jax.lm.losses import cross_entropy
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.packing import pack
from sparse_jax.metrics.reconstruction import fvu, reconstruction_sums
from sparse_jax.metrics.sparsity import density_shares, l0, sparsity_sums
from sparse_jax.metrics.splice import resume_with

# Rows of text at once, and stored activations at once.
ROWS, TOKENS = 8, 8192


@dataclass(frozen=True)
class Held:
    """Held-out text with the activations at the site.

    Attributes:
        lm, site: the model (float32) and where activations are replaced.
        targets: `[rows, position]` next tokens.
        mask: `[rows, position]` positions that count.
        tokens: `[rows, position]` ids.
        x: `[rows, position, d]` float32 activations.
        ce_clean: nats per prediction, over the positions that count.
    """

    lm: LanguageModel
    site: Site
    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    x: np.ndarray
    ce_clean: float


def held_out(model: str, site: str, train_text: str, text: str, tokens: int, context: int, stored: Path) -> Held:
    """At least `tokens` positions that count, of `text`, and the clean loss on them.

    Args:
        model, site: the language model and where its activations are taken.
        train_text, text: what was trained on, what is measured on.
        tokens, context: how many tokens, in rows of how many.
        stored: file (.npz) that all this is kept in, made where it is not there.

    Raises:
        InputError: a document of `text` is in `train_text` too; the file holds something else.
    """
    lm = load(model, dtype="float32")
    place = check_site(lm.config, site)
    asked = json.dumps([model, site, Path(train_text).name, text, tokens, context])
    if stored.exists():
        with np.load(stored) as found:
            if str(found["asked"]) != asked:
                raise InputError(f"{stored} holds {found['asked']}, not {asked}: remove it, or give another --stream")
            arrays = (found[name] for name in ("tokens", "targets", "mask", "x"))
            return Held(lm, place, *arrays, float(found["ce_clean"]))
    held = _measured(lm, place, train_text, text, tokens, context, load_tokenizer(resolve(model)))
    arrays = {name: getattr(held, name) for name in ("tokens", "targets", "mask", "x", "ce_clean")}
    temporary = stored.with_suffix(".tmp.npz")
    np.savez(temporary, asked=asked, **arrays)
    os.replace(temporary, stored)
    return held


def _measured(lm, place: Site, train_text: str, text: str, tokens: int, context: int, tokenizer) -> Held:
    """`held_out` without the file."""
    _, held = split(train_text, text, tokenizer=tokenizer, context=context)
    rows = pack(held, tokenizer, context)
    ids, targets, mask, _ = rows[row_indices(len(rows), 0, 0, len(rows))]
    reached = np.cumsum(np.sum(mask & (targets >= 0), axis=1)) >= tokens
    count = -(-(int(np.argmax(reached)) + 1) // ROWS) * ROWS
    if not reached[-1] or count > len(rows):
        raise InputError(f"{text} has too few tokens that count: {tokens:,} are asked for")
    ids, targets, mask = ids[:count], targets[:count], mask[:count]
    x = np.concatenate([activations(lm, jnp.array(ids[i : i + ROWS]), place) for i in range(0, count, ROWS)])
    mask = mask & (targets >= 0)
    clean = sum(
        float(_spliced(lm, place, *(jnp.array(a[i : i + ROWS]) for a in (targets, mask, x, x))))
        for i in range(0, count, ROWS)
    )
    return Held(lm, place, ids, targets, mask, x, clean / int(mask.sum()))


@partial(jax.jit, static_argnames="site")
def _spliced(lm, site: Site, targets, mask, x, x_hat):
    """Sum of the nats of the predictions that count, with x_hat in the place of x where they are made."""
    logits = resume_with(lm, x, site, x, x_hat, mask)
    return jnp.sum(jnp.where(mask, cross_entropy(logits, targets), 0))


@jax.jit
def _sums(trained, x, weight, shift):
    codes = trained.encode(x)
    x_hat = trained.decode(codes, x)
    return x_hat, reconstruction_sums(x, x_hat, weight, shift), sparsity_sums(codes, weight, jnp.ones(codes.shape[1]))


def reconstruct(trained: Normalised, x: np.ndarray, weight: np.ndarray, shift: np.ndarray):
    """Reconstructions `[tokens, d]`, and the sums of reconstruction and sparsity, float64."""
    trained, shift = in_float32(trained), jnp.array(shift, jnp.float32)
    pieces, totals = [], None
    for start in range(0, len(x), TOKENS):
        piece = x[start : start + TOKENS]
        short = TOKENS - len(piece)  # the last piece is filled up with rows that do not count
        padded = np.pad(piece, ((0, short), (0, 0)))
        counts = np.pad(weight[start : start + TOKENS], (0, short)).astype(np.float32)
        x_hat, *sums = _sums(trained, jnp.array(padded), jnp.array(counts), shift)
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        pieces.append(np.asarray(x_hat)[: len(piece)])
    return np.concatenate(pieces), *totals


def quick_figures(trained: Normalised, x: np.ndarray, shift: np.ndarray) -> dict[str, float]:
    """L0 and FVU on stored activations `[tokens, d]`."""
    _, reconstruction, sparsity = reconstruct(trained, x, np.ones(len(x)), shift)
    return {"l0": l0(sparsity), "fvu": fvu(reconstruction), **density_shares(sparsity)}


def figures(held: Held, trained: Normalised, shift: np.ndarray) -> dict[str, float]:
    """L0, FVU, ce_increase and the shares of dead, rare and dense features on the held-out text.

    Args:
        held: the text.
        trained: the dictionary, for raw activations.
        shift: `[d]` mean of the training activations.
    """
    flat = held.x.reshape(-1, held.x.shape[-1])
    x_hat, reconstruction, sparsity = reconstruct(trained, flat, held.mask.reshape(-1), shift)
    x_hat = x_hat.reshape(held.x.shape)
    arrays = held.targets, held.mask, held.x, x_hat
    nats = sum(
        float(_spliced(held.lm, held.site, *(jnp.array(a[i : i + ROWS]) for a in arrays)))
        for i in range(0, len(held.x), ROWS)
    )
    return {
        "l0": l0(sparsity),
        "fvu": fvu(reconstruction),
        "ce_increase": nats / int(held.mask.sum()) - held.ce_clean,
        "ce_clean": held.ce_clean,
        **density_shares(sparsity),
        "tokens_evaluated": int(reconstruction.tokens),
    }
