"""Generation with remembered keys and values: greedy or sampled, under edits."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.memory import Memory
from sparse_jax.lm.model import LanguageModel, check_edits, check_inputs, embedded, run_blocks, unembedded


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: `[batch, n_tokens]` int32, the new tokens alone; after a stop token it is repeated to the end.
        lengths: `[batch]` int32, how many of them count: up to and with the first stop token.
        logits: `[batch, n_tokens, vocab]` float32 that each new token was chosen from; None unless asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    logits: jax.Array | None


class Sampling(NamedTuple):
    """How a token is drawn from its logits; None: the most likely one.

    Attributes:
        temperature: logits are divided by it.
        top_p: only the most likely tokens that together reach this probability (1: all). Source: Holtzman et al. 2020.
    """

    temperature: jax.Array
    top_p: jax.Array


def generate(
    lm: LanguageModel,
    prompt: np.ndarray | jax.Array,
    n_tokens: int,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    edits: Sequence[Edit] = (),
    prompt_edits: Sequence[Edit] = (),
    keep_logits: bool = False,
) -> Generated:
    """Continue prompts token by token; each new token costs one position.

    Args:
        lm: the model.
        prompt: `[batch, position]` token ids. Shorter prompts of a batch are filled up at their end with any id.
        n_tokens: new tokens for each row.
        lengths: `[batch]` tokens of each prompt that count; None: all.
        temperature: 0: the most likely token; else logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the most likely tokens that together reach this probability.
        key: random key for drawing; must be given where temperature is above 0.
        stop_tokens: a row ends at the first of these.
        edits: hold for the prompt and at every new token. An edit for positions, a mask or from a first position on
            (`at`) means places in the whole row, prompt and new tokens together. Its function sees the prompt once and
            then one position at a time, so an argument with an axis over positions belongs into `prompt_edits`.
        prompt_edits: hold for the prompt alone; made after `edits` where both are at one site.
        keep_logits: also return the logits that each token was chosen from.

    Raises:
        InputError: numbers out of range, more positions than the model has, sites it lacks, sampling without a key.
    """
    prompt = np.asarray(prompt) if not isinstance(prompt, jax.Array) else prompt
    check_inputs(lm.config, prompt, 0)
    if prompt.ndim != 2:
        raise InputError(f"a prompt has shape [batch, position] and holds token ids; got {list(prompt.shape)}")
    batch, width = prompt.shape
    edits, prompt_edits = tuple(edits), tuple(prompt_edits)
    check_edits(lm.config, edits, batch, None)
    check_edits(lm.config, prompt_edits, batch, width)
    lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > width:
        raise InputError(f"lengths {lengths.tolist()}: give one integer from 1 to {width} for each of {batch} rows")
    if n_tokens < 1 or int(lengths.max()) + n_tokens > lm.config.max_positions:
        raise InputError(
            f"{n_tokens} new tokens after prompts of up to {lengths.max()}: give at least 1, and together at most the "
            f"model's {lm.config.max_positions} positions"
        )
    sampling = _check_sampling(lm.config.vocab_size, temperature, top_k, top_p, key)
    stops = np.array(sorted(set(stop_tokens)), np.int32)
    return _generate(
        _in_compute_dtype(lm), jnp.array(prompt), jnp.array(lengths, jnp.int32), edits, prompt_edits, sampling,
        jax.random.key(0) if key is None else key, jnp.array(stops), n_tokens=n_tokens, top_k=top_k,
        keep_logits=keep_logits,
    )  # fmt: skip


def _check_sampling(vocab_size, temperature, top_k, top_p, key) -> Sampling | None:
    if not temperature >= 0:
        raise InputError(f"temperature {temperature}: give 0 (the most likely token) or more")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise InputError(f"top_k {top_k}: give 1 to {vocab_size}, the model's vocabulary")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: give a probability above 0, at most 1")
    if temperature == 0:
        if top_k is not None or top_p != 1:
            raise InputError("top_k and top_p are for drawing tokens; give a temperature above 0 with them")
        return None
    if key is None:
        raise InputError(f"temperature {temperature} draws tokens at random: give a key, such as jax.random.key(0)")
    return Sampling(jnp.array(temperature, jnp.float32), jnp.array(top_p, jnp.float32))


def _in_compute_dtype(lm: LanguageModel) -> LanguageModel:
    """Matrices in the dtype that they are multiplied in: rounded once, not again at every token."""
    if all(leaf.dtype == jnp.dtype(lm.dtype) for leaf in jax.tree.leaves(lm.params)):
        return lm

    def rounded(path, leaf):
        return leaf if path[-1].key in ("scale", "bias") else leaf.astype(lm.dtype)

    return dataclasses.replace(lm, params=jax.tree_util.tree_map_with_path(rounded, lm.params))


@partial(jax.jit, static_argnames=("n_tokens", "top_k", "keep_logits"))
def _generate(lm, prompt, lengths, edits, prompt_edits, sampling, key, stops, n_tokens, top_k, keep_logits):
    batch, width = prompt.shape
    positions = jnp.arange(width, dtype=jnp.int32)
    memory = Memory.empty(lm.config, batch, width + n_tokens, jnp.dtype(lm.dtype))
    residual, _, memory = run_blocks(
        lm, embedded(lm, prompt, positions), positions, (*edits, *prompt_edits), memory=memory
    )
    # The prompt's last token predicts the first new one; what stands behind it is overwritten before it is seen.
    residual = jnp.take_along_axis(residual, (lengths - 1)[:, None, None], axis=1)

    def choose(logits, step):
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _draw(logits, sampling, top_k, jax.random.fold_in(key, step))

    def add_token(carry):
        step, memory, residual, ended, made = carry
        logits = unembedded(lm, residual)[:, 0]
        token = jnp.where(ended, made.tokens[:, jnp.maximum(step - 1, 0)], choose(logits, step))
        made = Generated(
            made.tokens.at[:, step].set(token),
            made.lengths + (~ended).astype(jnp.int32),
            made.logits.at[:, step].set(logits) if keep_logits else None,
        )
        ended = ended | jnp.any(token[:, None] == stops, axis=-1)
        here = (lengths + step)[:, None]
        residual, _, memory = run_blocks(lm, embedded(lm, token[:, None], here), here, edits, memory=memory)
        return step + 1, memory, residual, ended, made

    vocab = jax.eval_shape(lambda r: unembedded(lm, r), residual)
    made = Generated(
        jnp.zeros((batch, n_tokens), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, n_tokens, vocab.shape[-1]), vocab.dtype) if keep_logits else None,
    )
    start = jnp.array(0, jnp.int32), memory, residual, jnp.zeros(batch, bool), made
    step, *_, made = lax.while_loop(lambda c: (c[0] < n_tokens) & ~jnp.all(c[3]), add_token, start)
    # Where all rows ended early, their last tokens are repeated to the end.
    last = made.tokens[:, step - 1][:, None]
    return made._replace(tokens=jnp.where(jnp.arange(n_tokens, dtype=jnp.int32) < step, made.tokens, last))


def _draw(logits, sampling, top_k, key):
    """One token id `[batch]` from logits `[batch, vocab]`."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    if top_k is not None:
        logits = jnp.where(logits >= ordered[:, top_k - 1 : top_k], logits, -jnp.inf)
        ordered = jnp.where(jnp.arange(ordered.shape[1], dtype=jnp.int32) < top_k, ordered, -jnp.inf)
    # A token is kept while those before it have not reached top_p: the most likely one always is.
    p = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
