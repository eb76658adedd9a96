"""Edits: functions that change the value at a site while the model runs, and where at the site they do so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_jax.errors import InputError
from sparse_jax.lm.sites import HEAD_SITES, Site


@partial(jax.tree_util.register_dataclass, data_fields=["mask", "positions", "heads", "first"], meta_fields=[])
@dataclass(frozen=True)
class Where:
    """Which part of the value at a site an edit changes; make one with `at`. What is None does not restrict.

    Attributes:
        mask: `[batch, position]` bool (batch 1: the same for every row). Positions past its end are not chosen.
        positions: `[n]` int32, counted from the start of the row.
        heads: `[n]` int32.
        first: int32 scalar, or `[batch]`: only positions from this one on.
    """

    mask: jax.Array | None = None
    positions: jax.Array | None = None
    heads: jax.Array | None = None
    first: jax.Array | None = None

    def choose(self, site: str, new: jax.Array, old: jax.Array, positions: jax.Array) -> jax.Array:
        """`new` where chosen, `old` elsewhere.

        Args:
            site: the site's name; it says which axes are positions and heads.
            new, old: of one shape; of a pattern the queries' axis counts as the positions.
            positions: `[position]` or `[batch, position]` where the values stand in their rows.
        """
        positions = positions if positions.ndim == 2 else positions[None]
        chosen = jnp.ones(positions.shape, bool)
        if self.mask is not None:
            shape = max(len(self.mask), len(positions))
            mask, places = (jnp.broadcast_to(a, (shape, a.shape[1])) for a in (self.mask, positions))
            chosen = jnp.take_along_axis(mask, places, axis=1, mode="fill", fill_value=False)
        if self.positions is not None:
            chosen &= jnp.any(positions[..., None] == self.positions, axis=-1)
        if self.first is not None:
            chosen = chosen & (positions >= self.first.reshape(-1, 1))
        pattern = site == "attn_pattern"  # [batch, head, query, key]
        chosen = jnp.expand_dims(chosen, (1, 3) if pattern else tuple(range(2, old.ndim)))
        if self.heads is not None:
            of_heads = jnp.any(
                jnp.arange(old.shape[1 if pattern else 2], dtype=jnp.int32)[:, None] == self.heads, axis=-1
            )
            chosen = chosen & (of_heads[:, None, None] if pattern else of_heads[:, None])
        return jnp.where(chosen, new, old)


def at(
    positions: Sequence[int] | ArrayLike | None = None,
    heads: Sequence[int] | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    first: int | ArrayLike | None = None,
) -> Where:
    """Where an edit holds: at these positions AND of these heads AND where the mask is true AND from `first` on.

    Args:
        positions: places in the row, counted from 0. Of a pattern: those of the queries.
        heads: heads, counted from 0, at sites that have them (`attn_k` and `attn_v` have the key-value heads).
        mask: bool `[batch, position]`, or `[position]` for all rows.
        first: the first position that is changed; one number, or one for each row.

    Raises:
        InputError: negative numbers, no integers, a mask that is not bool or has another number of axes.
    """
    mask = None if mask is None else jnp.asarray(mask)
    if mask is not None and (mask.dtype != jnp.bool_ or mask.ndim not in (1, 2)):
        raise InputError(f"mask is {mask.dtype}{list(mask.shape)}; give bool [batch, position] or [position]")
    return Where(
        mask if mask is None or mask.ndim == 2 else mask[None],
        _numbers("positions", positions),
        _numbers("heads", heads),
        None if first is None else _numbers("first", first),
    )


def _numbers(name: str, given: Any) -> jax.Array | None:
    if given is None:
        return None
    if not isinstance(given, jax.Array):
        given = np.asarray(given)
        if given.dtype.kind not in "iu" or (given < 0).any():
            raise InputError(f"{name} is {given.tolist()}; give integers from 0 on")
    return jnp.atleast_1d(jnp.asarray(given).astype(jnp.int32))


@partial(jax.tree_util.register_dataclass, data_fields=["args", "where"], meta_fields=["site", "fn"])
@dataclass(frozen=True)
class Edit:
    """At `site`, `value` becomes `fn(value, *args)`, everywhere or only where `where` says.

    Attributes:
        site: which site; text is parsed.
        fn: a pure function of the value and the arguments that keeps shape and dtype. It is part of what is compiled:
            give a module-level function, not a fresh lambda at each call. `sparse_jax.lm.interventions` has the usual.
        args: arrays (or pytrees of them), traced: other arguments of the same shapes compile nothing new.
        where: positions, heads or a mask, traced like the arguments; see `at`.
    """

    site: Site
    fn: Callable[..., jax.Array]
    args: Any = ()
    where: Where | None = None

    def __post_init__(self):
        object.__setattr__(self, "site", Site.parse(self.site))

    def __call__(self, value: jax.Array, positions: jax.Array) -> jax.Array:
        """The edited value; `positions [position]` or `[batch, position]` say where in their rows the values stand."""
        changed = self.fn(value, *self.args)
        if changed.shape != value.shape or changed.dtype != value.dtype:
            raise ValueError(
                f"the edit at {self.site} turned {value.dtype}{list(value.shape)} into "
                f"{changed.dtype}{list(changed.shape)}; an edit keeps shape and dtype"
            )
        return changed if self.where is None else self.where.choose(self.site.name, changed, value, positions)


def check_edit(edit: Edit, n_heads: int, rows: int, length: int | None) -> None:
    """Compare where an edit holds with what the pass has.

    Args:
        edit: the edit.
        n_heads: heads at its site.
        rows, length: rows and positions of the pass; None where more positions are to come (generation).

    Raises:
        InputError: heads at a site that has none, a head or a position outside, a mask of another shape.
    """
    where = edit.where
    if where is None:
        return
    if where.heads is not None:
        if edit.site.name not in HEAD_SITES:
            raise InputError(
                f"the edit at {edit.site} is for certain heads; sites with heads are {', '.join(HEAD_SITES)}"
            )
        _check_below(where.heads, n_heads, f"head of the edit at {edit.site}", "heads")
    for name, given in (("mask", where.mask), ("first position", where.first)):
        if given is not None and len(given) not in (1, rows):
            raise InputError(f"the {name} of the edit at {edit.site} is for {len(given)} rows, the pass has {rows}")
    if length is None:
        return
    if where.mask is not None and where.mask.shape[1] != length:
        raise InputError(
            f"the mask of the edit at {edit.site} is for {where.mask.shape[1]} positions, the pass has {length}"
        )
    if where.positions is not None:
        _check_below(where.positions, length, f"position of the edit at {edit.site}", "positions")


def _check_below(numbers: jax.Array, limit: int, what: str, plural: str) -> None:
    if isinstance(numbers, jax.core.Tracer):
        return
    if numbers.size and (worst := int(numbers.max())) >= limit:
        raise InputError(f"{what} is {worst}, but there are {limit} {plural}, counted from 0")
