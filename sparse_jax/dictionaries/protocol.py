"""What a dictionary is: static choices with pure methods, and the register of architectures.

Notation used by every architecture: `x [rows, d_in]` normalised activations, `c [rows, n_features]` codes,
`y [rows, d_out]` what is to be reconstructed (the same as x for an autoencoder), `W_enc [d_in, n_features]`, `b_enc`,
`W_dec [n_features, d_out]`, `b_dec`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from sparse_jax.errors import InputError

Params = dict[str, jax.Array]


class Batch(NamedTuple):
    """One batch of activations.

    Attributes:
        x: `[rows, d_in]` normalised input.
        target: `[rows, d_out]` what to reconstruct; x itself for an autoencoder.
        weight: `[rows]` 1 for rows that count, 0 for masked ones.
        rows: whole unshuffled rows of text for objectives that run the language model, else None.
    """

    x: jax.Array
    target: jax.Array
    weight: jax.Array
    rows: Any = None


class Ramp(NamedTuple):
    """How a coefficient comes to its value: linearly from `start`, between two shares of the run.

    Attributes:
        start: where it stands before; None: at its value, all the time.
        begin, end: shares of the run; end None: the share of the run's schedule (`coefficient_warmup`).
    """

    start: float | None
    begin: float = 0.0
    end: float | None = None


# Of a coefficient that means something other than a strength (a k, a count): no warm-up.
HELD = Ramp(None)


class Context(NamedTuple):
    """What a loss may depend on beside parameters and data; all traced.

    Attributes:
        coefficients: name -> scalar (the l1 coefficient, a current k, ...), schedules already applied.
        age: `[n_features]` int32, rows since each feature last fired.
        key: a key of this step's own.
        step: int32, how many steps came before.
        dead_window: int32, a feature that was silent for more rows counts as dead.
    """

    coefficients: dict[str, jax.Array]
    age: jax.Array
    key: jax.Array
    step: jax.Array
    dead_window: jax.Array


class Losses(NamedTuple):
    """What a loss returns.

    Attributes:
        terms: name -> weighted scalar; the objective is their sum.
        y_hat: `[rows, d_out]` the reconstruction.
        fired: `[n_features]` int32, on how many of the rows that count each feature was active.
        frozen: new values of the parameters named in `frozen`.
    """

    terms: dict[str, jax.Array]
    y_hat: jax.Array
    fired: jax.Array
    frozen: Params


@dataclass(frozen=True)
class Dictionary(ABC):
    """Static choices of a dictionary. Hashable (a static argument of jit), JSON-able, a subcommand of `train_sae`.

    Attributes:
        expansion: features per input dimension, where n_features is not given.
        n_features: number of features; 0 means expansion x d_in.
        d_in, d_out: widths, set by the site (`sized`), never by a flag.
        compute_dtype: dtype of the inputs of matrix products; parameters, sums and losses are float32.
    """

    expansion: int = 8
    n_features: int = 0
    d_in: tyro.conf.Suppress[int] = 0
    d_out: tyro.conf.Suppress[int] = 0
    compute_dtype: tyro.conf.Suppress[str] = "float32"

    kind: ClassVar[str]

    def sized(self, d_in: int, d_out: int | None = None, compute_dtype: str = "float32"):
        """This dictionary for a site of width `d_in`.

        Raises:
            InputError: neither expansion nor n_features is positive.
        """
        n_features = self.n_features or self.expansion * d_in
        if n_features <= 0:
            raise InputError(f"--n-features {self.n_features} and --expansion {self.expansion}: give a positive number")
        return dataclasses.replace(
            self, n_features=n_features, d_in=d_in, d_out=d_out or d_in, compute_dtype=compute_dtype
        )

    @property
    def coefficients(self) -> dict[str, float]:
        """Default values of the traced coefficients."""
        return {}

    @property
    def coefficient_fields(self) -> dict[str, str]:
        """Coefficient -> the field that gives its value, for those that may change without a new compiled step."""
        return {name: name for name in self.coefficients}

    @property
    def step_form(self) -> Hashable:
        """Which of several forms the compiled step takes, where a field in `coefficient_fields` decides that.

        Dictionaries that differ in it do not share a step.
        """
        return ()

    @property
    def ramps(self) -> dict[str, Ramp]:
        """Coefficient -> how it comes to its value, for those that are not warmed up from 0 by the run's schedule."""
        return {}

    @property
    def sparsity_coefficient(self) -> str | None:
        """The coefficient that a larger value of makes codes sparser, for a controller to move; None: there is none."""
        return None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names in params that the optimiser never sees; `Losses.frozen` returns their new values."""
        return ()

    @property
    def labels(self) -> dict[str, str]:
        """Parameter name -> learning-rate group, for those that are not in the group "main"."""
        return {}

    @property
    def group_factors(self) -> dict[str, float]:
        """Learning-rate group -> its rate over that of "main", for the groups in `labels` where it is not 1."""
        return {}

    @abstractmethod
    def init(self, key: jax.Array) -> Params:
        """Parameters, float32: all that inference needs."""

    @abstractmethod
    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Codes `[rows, n_features]` of `x [rows, d_in]` by the inference rule."""

    @abstractmethod
    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Reconstruction `[rows, d_out]` of codes; `x` only matters where there is a skip path."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """The training rule: weighted terms, averaged over the rows that count."""

    def tangent(self, params: Params, grads: Params) -> Params:
        """Gradients as the optimiser should see them (projected onto a constraint's tangent, say)."""
        return grads

    def project(self, params: Params) -> Params:
        """Parameters put back onto their constraint after an update."""
        return params

    @abstractmethod
    def directions(self, params: Params) -> jax.Array:
        """`[n_features, d_out]`: what a unit of each feature adds to the reconstruction."""

    def value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        """(objective, losses, gradients of the trained parameters), by autodiff of the summed terms."""
        trained = {name: value for name, value in params.items() if name not in self.frozen}

        def objective(trained):
            losses = self.loss({**params, **trained}, batch, ctx)
            return sum(losses.terms.values()), losses

        (value, losses), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return value, losses, grads


DICTIONARIES: dict[str, type[Dictionary]] = {}


def register(kind: str) -> Callable[[type], type]:
    """Class decorator: make an architecture known under `kind`, the name of its subcommand and in saved files."""

    def decorate(cls):
        if kind in DICTIONARIES:
            raise ValueError(f"two dictionaries are called {kind!r}")
        cls.kind = kind
        DICTIONARIES[kind] = cls
        return cls

    return decorate


def to_json(dictionary: Dictionary) -> dict:
    """The static choices as a JSON-able dict; `from_json` gives an equal dictionary back."""
    return {"kind": dictionary.kind, **dataclasses.asdict(dictionary)}


def from_json(fields: dict) -> Dictionary:
    """The dictionary that `to_json` described.

    Raises:
        InputError: a kind that is not registered, or fields that it does not have.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in DICTIONARIES:
        raise InputError(f"dictionary kind {kind!r} is not known; known are {', '.join(DICTIONARIES)}")
    try:
        return DICTIONARIES[kind](**fields)
    except TypeError as error:
        raise InputError(f"fields of a saved {kind} dictionary do not fit this version: {error}") from error


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of `values [rows]` over the rows that count."""
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)


def reconstruction_loss(y_hat: jax.Array, batch: Batch) -> jax.Array:
    """Squared error summed over dimensions, mean over the rows that count."""
    return weighted_mean(jnp.sum((y_hat - batch.target) ** 2, axis=-1), batch.weight)


def firings(codes: jax.Array, weight: jax.Array) -> jax.Array:
    """`[n_features]` int32: on how many of the rows that count each feature is not zero."""
    return jnp.sum((codes != 0) & (weight > 0)[:, None], axis=0, dtype=jnp.int32)
