"""What a model family must say about itself, and the register of families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.lm.tap import Tap


class Config(Protocol):
    """What every family's config has beside its own fields. Configs are frozen dataclasses: hashable, static."""

    model_type: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    initializer_range: float


class Pass(NamedTuple):
    """What a block is told besides the residual stream.

    Attributes:
        positions: `[position]`, or `[batch, position]` where rows stand at positions of their own.
        layer: which block this is: an int, or traced where the blocks run in a loop.
        tap: called at every site.
        attend: (q, k, v, scale, tap, window) -> z; as `attention.causal_attention`, which it is unless keys and values
            are remembered between passes.
    """

    positions: jax.Array
    layer: int | jax.Array
    tap: Tap
    attend: Callable[..., jax.Array]


@dataclass(frozen=True)
class Family:
    """One family of language models.

    Attributes:
        model_types: the `model_type`s of Hugging Face configs that it reads.
        read_config: from the parsed `config.json` to the family's config; raises InputError for what it cannot do.
        weights: config -> {"embed", "blocks", "head"} -> nested dict of `Weight`.
        prefix: what the names of all tensors but the unembedding begin with; files of a model that was saved without
            its head lack it.
        ignored: regular expressions of checkpoint tensors that are no weights (saved buffers).
        embed: (config, params, tokens, positions, dtype) -> residual `[batch, position, d_model]`.
        block: (config, dtype) -> Linen module, called as `module(residual, run)` with a `Pass`.
        unembed: (config, params, residual, dtype) -> logits `[batch, position, vocab]`, final norm included.
        missing_site: (config, site name) -> why this model lacks the site, or None if it has it.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[dict], Any]
    weights: Callable[[Any], dict]
    prefix: str
    ignored: tuple[str, ...]
    embed: Callable[..., Any]
    block: Callable[..., Any]
    unembed: Callable[..., Any]
    missing_site: Callable[[Any, str], str | None] = lambda config, name: None


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known under each of its model types."""
    for model_type in family.model_types:
        FAMILIES[model_type] = family
    return family


def family_of(model_type: str | None) -> Family:
    """The family for a Hugging Face `model_type`.

    Raises:
        InputError: no family here reads it.
    """
    if model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def of_layer(values: tuple[int, ...], layer: int | jax.Array) -> int | jax.Array:
    """`values[layer]`: a plain int where the layer is known or all layers agree, else picked while running."""
    if len(set(values)) == 1:
        return values[0]
    return values[layer] if isinstance(layer, int) else jnp.array(values, jnp.int32)[layer]


def check_heads(width: int, heads: int, model_type: str) -> None:
    """Raises InputError where the heads do not divide the width."""
    if width % heads:
        raise InputError(f"config.json of a {model_type} model: width {width} is not a multiple of its {heads} heads")
