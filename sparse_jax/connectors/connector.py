"""What a connector is: a model from the codes of one dictionary to those of another, on the dictionary protocol.

Notation of every connector: `x [rows, d_in]` input codes in any form (`sparse_product.py`); `h [rows, n_features]`
hidden codes (`encode`); `y_hat [rows, d_out]` predicted target codes (`decode`); `W_enc [d_in, n_features]`, `b_enc`,
`W_dec [n_features, d_out]`, `b_dec`. A connector without a hidden layer has its inputs as hidden codes, and no `W_enc`.

    loss = mean over rows of sum_j (y_hat_j - y_j)^2 / s_j^2
         + alpha * sum |W| * (norm of what it reads) / (scale of what it writes)
         + hidden_l1 * mean over rows of sum |h|                          where there are hidden codes

s_j is the scale of target j, the norm of input i is r_i (`scaling.py`), those of hidden codes are 1. Parameters and
predictions are in the targets' own units and per unit of the inputs: s and r are frozen parameters that only the
loss reads. With x / r and y / s in place of x and y the same loss has s = r = 1: `in_scaled_units` and `in_own_units`
go from one to the other, and the trainer works there (Adam's step is then in proportion to each weight's unit).

Source: "Finding sparse linear connections between features in LLMs" (Riggs et al. 2023); there neither
inputs nor targets were scaled.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_jax.connectors.sparse_product import Codes, active, as_dense
from sparse_jax.connectors.squared_error import squared_error
from sparse_jax.dictionaries.protocol import HELD, Batch, Context, Dictionary, Losses, Params, Ramp
from sparse_jax.errors import InputError

# Parameters that only the loss reads.
_UNITS = ("input_norm", "target_scale")


@dataclass(frozen=True)
class Connector(Dictionary):
    """Static choices of a connector.

    Attributes:
        n_features: hidden codes; those without a hidden layer have as many as inputs (`sized`).
        with_bias: add a bias in each layer.
        alpha: weight of the l1 norm of the weights.
    """

    with_bias: bool = True
    alpha: float = 0.0

    def __post_init__(self):
        if self.alpha < 0:
            raise InputError(f"--alpha {self.alpha}: the weight of a penalty cannot be negative")

    # What each matrix reads and writes: "input", "hidden", "target" or a side of its own. Set by every connector.
    reads_writes: ClassVar[dict[str, tuple[str, str]]] = {}
    # Which bias belongs to what.
    bias_sides: ClassVar[dict[str, str]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers on each side that a matrix reads or writes."""
        return {"input": self.d_in, "hidden": self.n_features, "target": self.d_out}

    @property
    def coefficients(self) -> dict[str, float]:
        """`alpha`."""
        return {"alpha": self.alpha}

    @property
    def ramps(self) -> dict[str, Ramp]:
        """Coefficients are warmed up by no one: the proximal step starts from small weights."""
        return dict.fromkeys(self.coefficients, HELD)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The norms of inputs and the scales of targets."""
        return _UNITS

    @property
    def trained_weights(self) -> tuple[str, ...]:
        """Names of the matrices that are trained."""
        return tuple(name for name in self.reads_writes if name not in self.frozen)

    def init(self, key: jax.Array) -> Params:
        """Weights drawn as each connector says, biases 0, norms and scales 1."""
        params = self.init_weights(key)
        if self.with_bias:
            params |= {name: jnp.zeros(self.sizes[side], jnp.float32) for name, side in self.bias_sides.items()}
        ones = {"input_norm": jnp.ones(self.d_in, jnp.float32), "target_scale": jnp.ones(self.d_out, jnp.float32)}
        return {**params, **ones}

    @abstractmethod
    def init_weights(self, key: jax.Array) -> Params:
        """The weight matrices, for inputs of norm 1 and targets of scale 1."""

    def predict(self, params: Params, x: Codes) -> jax.Array:
        """Predicted target codes `[rows, d_out]`, in the targets' own units."""
        return self.decode(params, self.encode(params, x), x)

    def hidden(self, params: Params, x: Codes) -> jax.Array:
        """Hidden codes `[rows, n_features]` with their zeros; of a connector without a hidden layer the inputs."""
        return as_dense(self.encode(params, x), self.n_features)

    def weights(self, params: Params) -> jax.Array:
        """`[d_in, d_out]`, target units per unit of input: of those that have just one matrix.

        Raises:
            InputError: the connector has a hidden layer.
        """
        raise InputError(f"a {self.kind} connector has no single matrix of weights: give a linear one")

    def bias(self, params: Params) -> jax.Array:
        """`[d_out]`: what is predicted of hidden codes of 0; zeros without a bias."""
        return params.get("b_dec", jnp.zeros(self.d_out, params["target_scale"].dtype))

    def directions(self, params: Params) -> jax.Array:
        """The rows of W_dec."""
        return params["W_dec"]

    def weight_units(self, params: Params) -> Params:
        """`[reads, writes]` of each matrix: the units (scale of what it writes / norm of what it reads) of an entry."""
        return {
            name: _units(params, writes, self)[None, :] / _units(params, reads, self)[:, None]
            for name, (reads, writes) in self.reads_writes.items()
        }

    def weight_l1(self, params: Params) -> jax.Array:
        """The l1 norm of all trained weights in their units."""
        units = self.weight_units(params)
        return sum(jnp.sum(jnp.abs(params[name]) / units[name]) for name in self.trained_weights)

    def squared_error(self, params: Params, hidden: Codes, batch: Batch) -> jax.Array:
        """The scaled squared error of what hidden codes predict."""
        return squared_error(self.decode(params, hidden, batch.x), batch.target, params["target_scale"], batch.weight)

    def smooth_terms(self, params: Params, hidden: Codes, batch: Batch, ctx: Context) -> dict[str, jax.Array]:
        """Terms of the loss but for the l1 norm of the weights, which is the proximal step's."""
        return {"reconstruction": self.squared_error(params, hidden, batch)}

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction", "weight_l1" and, where hidden codes have a penalty of their own, "hidden_l1".

        `batch.x` and `batch.target` may be in any form of codes.
        """
        hidden = self.encode(params, batch.x)
        terms = self.smooth_terms(params, hidden, batch, ctx)
        terms["weight_l1"] = ctx.coefficients["alpha"] * self.weight_l1(params)
        fired = hidden_firings(hidden, batch.weight, self.n_features)
        y_hat = self.decode(params, hidden, batch.x)  # not computed where a compiled function has no use for it
        return Losses(terms, y_hat, fired, {name: params[name] for name in self.frozen})

    def smooth_value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[dict, jax.Array, Params]:
        """(terms, fired, gradients) of the loss without the l1 norm of the weights."""
        trained = {name: value for name, value in params.items() if name not in self.frozen}

        def objective(trained):
            inside = {**params, **trained}
            hidden = self.encode(inside, batch.x)
            terms = self.smooth_terms(inside, hidden, batch, ctx)
            return sum(terms.values()), (terms, hidden_firings(hidden, batch.weight, self.n_features))

        (_, (terms, fired)), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return terms, fired, grads

    def in_scaled_units(self, params: Params) -> Params:
        """Parameters of the same function between x / input_norm and y / target_scale, whose norms and scales are 1."""
        return self._scaled(params, params["input_norm"], params["target_scale"], -1)

    def in_own_units(self, params: Params, input_norm: jax.Array, target_scale: jax.Array) -> Params:
        """The inverse: parameters between x and y, of those between x / input_norm and y / target_scale."""
        return self._scaled(params, input_norm, target_scale, 1)

    def _scaled(self, params, input_norm, target_scale, sign):
        around = {**params, "input_norm": input_norm, "target_scale": target_scale}
        units = self.weight_units(around)
        units |= {name: _units(around, side, self) for name, side in self.bias_sides.items() if name in params}
        moved = {name: params[name] * units[name] if sign > 0 else params[name] / units[name] for name in units}
        ends = {name: around[name] if sign > 0 else jnp.ones_like(around[name]) for name in _UNITS}
        return {**params, **moved, **ends}


def _units(params: Params, side: str, connector: Connector) -> jax.Array:
    outer = {"input": "input_norm", "target": "target_scale"}
    return params[outer[side]] if side in outer else jnp.ones(connector.sizes[side], params["input_norm"].dtype)


def hidden_firings(codes: Codes, weight: jax.Array, n_features: int) -> jax.Array:
    """`[n_features]` int32: on how many of the rows that count each hidden code is not zero."""
    counts = weight > 0
    if (sparse := active(codes)) is not None:
        fired = ((sparse.values != 0) & counts[:, None]).astype(jnp.int32)
        return jnp.zeros(n_features, jnp.int32).at[sparse.indices.reshape(-1)].add(fired.reshape(-1))
    return jnp.sum((codes != 0) & counts[:, None], axis=0, dtype=jnp.int32)


CONNECTORS: dict[str, type[Connector]] = {}


def register_connector(kind: str) -> Callable[[type], type]:
    """Class decorator: make a connector known under `kind`, its name in flags and saved files."""

    def decorate(cls):
        if kind in CONNECTORS:
            raise ValueError(f"two connectors are called {kind!r}")
        cls.kind = kind
        CONNECTORS[kind] = cls
        return cls

    return decorate


def connector_from_json(fields: dict) -> Connector:
    """The connector that `dictionaries.to_json` described.

    Raises:
        InputError: a kind that is not registered, or fields that it does not have.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in CONNECTORS:
        raise InputError(f"connector kind {kind!r} is not known; known are {', '.join(CONNECTORS)}")
    try:
        return CONNECTORS[kind](**fields)
    except TypeError as error:
        raise InputError(f"fields of a saved {kind} connector do not fit this version: {error}") from error


def connector_to_json(connector: Connector) -> dict:
    """The static choices as a JSON-able dict; `connector_from_json` gives an equal connector back."""
    return {"kind": connector.kind, **dataclasses.asdict(connector)}


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["connector"])
@dataclass(frozen=True)
class Trained:
    """A connector with its parameters. A pytree: pass it to jitted functions as it is.

    Attributes:
        connector: the static choices.
        params: its parameters, in the targets' units and per unit of the inputs.
    """

    connector: Connector
    params: Params

    def predict(self, x: Codes) -> jax.Array:
        """Predicted target codes `[rows, d_out]` in the targets' own units."""
        return self.connector.predict(self.params, x)

    def hidden(self, x: Codes) -> jax.Array:
        """Hidden codes `[rows, n_features]`."""
        return self.connector.hidden(self.params, x)

    def weights(self) -> jax.Array:
        """`[d_in, d_out]`, target units per unit of input; raises InputError where there is a hidden layer."""
        return self.connector.weights(self.params)

    def bias(self) -> jax.Array:
        """`[d_out]`."""
        return self.connector.bias(self.params)
