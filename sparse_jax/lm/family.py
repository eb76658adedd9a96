"""What a model family must say about itself, and the register of families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sparse_jax.errors import InputError


class Config(Protocol):
    """What every family's config has beside its own fields. Configs are frozen dataclasses: hashable, static."""

    model_type: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class Weight:
    """One parameter of the port and where it comes from.

    Attributes:
        source: the tensor's name in the checkpoint, with `{layer}` for those of a block.
        shape: its shape there.
        convert: from that tensor to the port's parameter.
    """

    source: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


@dataclass(frozen=True)
class Family:
    """One family of language models.

    Attributes:
        model_types: the `model_type`s of Hugging Face configs that it reads.
        read_config: from the parsed `config.json` to the family's config; raises InputError for what it cannot do.
        weights: config -> {"embed", "blocks", "head"} -> nested dict of `Weight`.
        ignored: regular expressions of checkpoint tensors that are no weights (saved buffers).
        embed: (config, params["embed"], tokens, dtype) -> residual `[batch, position, d_model]`.
        block: (config, dtype) -> Linen module, called as `module(residual, positions, tap)` with a `Tap`.
        unembed: (config, params["head"], residual, dtype) -> logits `[batch, position, vocab]`, final norm included.
        missing_site: (config, site name) -> why this model lacks the site, or None if it has it.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[dict], Any]
    weights: Callable[[Any], dict]
    ignored: tuple[str, ...]
    embed: Callable[..., Any]
    block: Callable[..., Any]
    unembed: Callable[..., Any]
    missing_site: Callable[[Any, str], str | None]


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
