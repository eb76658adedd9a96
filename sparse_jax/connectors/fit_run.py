"""The steps of connectors in training: `fit.py` is the loop around them."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_jax.connectors.connector import Connector, Trained
from sparse_jax.connectors.fit_mesh import check_batch, dense_over_devices, fit_shardings, placed, placed_batch
from sparse_jax.connectors.pair_batches import PairBatches
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.proximal import AdamState, init_adam, momentum, proximal_adam
from sparse_jax.connectors.scaling import InputRule, Scales, TargetRule, scales_of
from sparse_jax.connectors.sparse_product import TwoWayCodes, as_dense
from sparse_jax.dictionaries.protocol import Batch, Context, Params
from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import divided

# A batch's squared error this many times that of a constant prediction, past the warm-up, is divergence.
_DIVERGED = 100.0


@dataclass(frozen=True)
class FitOptions:
    """How connectors are trained.

    Attributes:
        tokens: tokens seen; 0: each of the pair's once. More than there are is several passes.
        batch: tokens in a step.
        learning_rate: Adam's, at its peak, for members that have none of their own.
        warmup: share of the steps over which it rises from 0.
        decay: share of the steps, the last ones, over which it falls to 0, as a square.
        targets, inputs: rules of scaling, see scaling.py.
        order_seed: of the order of tokens.
        log_every: steps from one log row to the next.
        checkpoint_every: steps from one checkpoint to the next.
    """

    tokens: int = 0
    batch: int = 2048
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.5
    targets: TargetRule = "variance"
    inputs: InputRule = "rms"
    order_seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self):
        for name in ("batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        if self.tokens < 0:
            raise InputError(f"--tokens {self.tokens}: give a number of tokens, or 0 for all of them once")
        if self.learning_rate <= 0:
            raise InputError(f"--learning-rate {self.learning_rate}: give a positive one")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise InputError(f"--warmup {self.warmup} and --decay {self.decay}: give shares that add up to 1 at most")

    def steps(self, tokens: int) -> int:
        """Steps of a run over a pair of so many tokens."""
        return (self.tokens or tokens) // self.batch

    def rate(self, step: int, steps: int) -> float:
        """Multiplier of the learning rate at a step, in (0, 1]."""
        up = (step + 1) / max(1, round(self.warmup * steps))
        return min(1.0, up, self.falling(step, steps))

    def falling(self, step: int, steps: int) -> float:
        """How far the rate has come down: 1 before its decay, then falling to 0 with the square of what is left."""
        return min(1.0, (steps - step) / max(1, round(self.decay * steps))) ** 2


@dataclass(frozen=True)
class Member:
    """In what the connectors of one run may differ.

    Attributes:
        coefficients: values in place of the connector's own, by name ("alpha", "hidden_l1").
        seed: of its starting weights.
        learning_rate: None: the run's.
    """

    coefficients: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    learning_rate: float | None = None

    def of(self, connector: Connector) -> Connector:
        """The connector with this member's coefficients.

        Raises:
            InputError: a coefficient that it does not have.
        """
        if unknown := sorted(self.coefficients.keys() - connector.coefficients.keys()):
            raise InputError(
                f"coefficients {', '.join(unknown)} of a {connector.kind} connector: it has "
                f"{', '.join(connector.coefficients)}"
            )
        return dataclasses.replace(connector, **{name: float(value) for name, value in self.coefficients.items()})


class FitState(NamedTuple):
    """A member in training, in scaled units.

    Attributes:
        params: with the frozen ones, which are 1.
        adam: of the trained ones.
        fired: `[n_features]` int32, rows on which each hidden code fired since the start; at most 2^30.
    """

    params: Params
    adam: AdamState
    fired: jax.Array


@dataclass(eq=False)
class FitRun:
    """The parts of a run that do not change.

    Attributes:
        connector: sized, with the coefficients of none of the members.
        own: the connector of each member.
        members: in what they differ.
        options: how they are trained.
        steps: of the whole run.
        batches: its tokens, in scaled units.
        keep_support: weights that are 0 at the start stay so.
        mesh: devices that share the work, see fit_mesh.py.
    """

    connector: Connector
    own: Sequence[Connector]
    members: Sequence[Member]
    options: FitOptions
    steps: int
    batches: PairBatches
    keep_support: bool
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        connector: Connector,
        pair: Pair,
        options: FitOptions,
        members: Sequence[Member],
        scales: Scales | None = None,
        keep_support: bool = False,
        mesh: Mesh | None = None,
    ) -> "FitRun":
        """The run that these arguments of `fit` ask for; raises InputError as it says."""
        connector = connector.sized(pair.inputs.n_features, pair.targets.n_features)
        if not members:
            raise InputError("no members to train: give at least one")
        own = [member.of(connector) for member in members]
        steps = options.steps(len(pair))
        if not steps or options.batch > len(pair):
            raise InputError(
                f"{len(pair)} tokens, --tokens {options.tokens or len(pair)} and --batch {options.batch}: not one "
                "full batch; give more tokens or a smaller batch"
            )
        check_batch(mesh, options.batch)
        scales = scales_of(pair, options.targets, options.inputs) if scales is None else scales
        _check_finite(pair, scales)
        batches = PairBatches(pair, scales, options.batch, options.order_seed, by_feature=mesh is None)
        return cls(connector, own, members, options, steps, batches, keep_support, mesh)

    def __post_init__(self):
        # One compiled step for all: in what members differ is traced.
        self.static = dataclasses.replace(self.connector, **dict.fromkeys(self.connector.coefficients, 0.0))
        # At most the mean square of scaled targets: what a prediction of 0 costs.
        means = self.batches.scales.target_mean / self.batches.scales.target_scale
        self.constant_error = len(means) + float(np.sum(means**2))
        self._on_mesh = None

    def start(self, i: int, at: Trained | None = None) -> FitState:
        """The state of member `i` before the first step, on the mesh where there is one."""
        params = self.own[i].init(jax.random.key(self.members[i].seed))
        scales = self.batches.scales
        if at is not None:
            units = {"input_norm": jnp.array(scales.input_norm), "target_scale": jnp.array(scales.target_scale)}
            params = jax.tree.map(jnp.copy, self.own[i].in_scaled_units({**at.params, **units}))
        elif "b_dec" in params:
            params["b_dec"] = jnp.array(scales.target_mean / scales.target_scale)
        trained = {name: value for name, value in params.items() if name not in self.connector.frozen}
        return self.placed(FitState(params, init_adam(trained), jnp.zeros(self.connector.n_features, jnp.int32)))

    def placed(self, state: FitState) -> FitState:
        """The state on the mesh, where there is one."""
        return state if self.mesh is None else placed(self.mesh, state)

    def step(self, states, batch, number: int):
        """(states, terms of each) after a step of each member; the old states are consumed."""
        moved, step = [], self._compiled(states[0])
        if self.mesh is not None:
            batch = placed_batch(self.mesh, batch)
        for own, member, state in zip(self.own, self.members, states):
            rate = self.options.rate(number, self.steps) * (member.learning_rate or self.options.learning_rate)
            coefficients = {name: np.float32(value) for name, value in own.coefficients.items()}
            b1 = momentum(self.options.falling(number, self.steps), self.steps)
            numbers = tuple(map(np.float32, (rate, b1, number + 1)))
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                moved.append(step(state, batch, coefficients, numbers))
        return [state for state, _ in moved], [terms for _, terms in moved]

    def _compiled(self, state: FitState):
        if self.mesh is None:
            return partial(_step, self.static, self.keep_support)
        if self._on_mesh is None:
            whole = NamedSharding(self.mesh, PartitionSpec())
            self._on_mesh = jax.jit(
                partial(_stepped, self.static, self.keep_support),
                out_shardings=(fit_shardings(self.mesh, state), whole),
                donate_argnums=0,
            )
        return self._on_mesh

    def rows(self, states, terms, done: int) -> list[dict]:
        """Rows of the log; raises InputError where a member diverges."""
        rows = []
        for i, (state, of, member) in enumerate(zip(states, terms, self.members)):
            values = {name: float(value) for name, value in jax.device_get(of).items()}
            summary = jax.device_get(_summary(self.static, state.params))
            rows.append(
                {"step": done, "tokens": done * self.options.batch, "member": i, **member.coefficients, **values}
                | {name: float(value) for name, value in summary.items()}
            )
            self._check(rows[-1], done)
        return rows

    def _check(self, row, done):
        error = row["reconstruction"]
        bound = _DIVERGED * self.constant_error
        if not math.isfinite(error) or (done > self.options.warmup * self.steps and error > bound):
            raise InputError(
                f"member {row['member']} diverges: a squared error of {error:.3g} at step {done}; lower the learning "
                "rate"
            )

    def identity(self) -> dict:
        """What a checkpoint must agree with to be continued."""
        pair, scales = self.batches.pair, self.batches.scales
        return {
            "connectors": [str(each) for each in self.own],
            "seeds": [member.seed for member in self.members],
            "rates": [member.learning_rate for member in self.members],
            "options": {
                name: value
                for name, value in dataclasses.asdict(self.options).items()
                if name not in ("log_every", "checkpoint_every")
            },
            "keep_support": self.keep_support,
            "pair": [pair.inputs.name, pair.targets.name, len(pair)],
            "scales": [float(np.sum(a, dtype=np.float64)) for a in (scales.input_norm, scales.target_scale)],
        }


def _stepped(
    connector: Connector, keep_support: bool, state: FitState, codes, coefficients, numbers
) -> tuple[FitState, dict]:
    rate, b1, count = numbers
    x, y = codes
    if divided():
        x, y = dense_over_devices(x, connector.d_in, False), dense_over_devices(y, connector.d_out, True)
    x = x if isinstance(x, TwoWayCodes) else as_dense(x, connector.d_in)
    y = y if isinstance(y, TwoWayCodes) else as_dense(y, connector.d_out)
    rows = (y.codes.values if isinstance(y, TwoWayCodes) else y).shape[0]
    zero = jnp.zeros((), jnp.int32)
    ctx = Context(coefficients, state.fired, jax.random.key(0), zero, zero)
    batch = Batch(x, y, jnp.ones(rows, jnp.float32))
    terms, fired, grads = connector.smooth_value_and_grad(state.params, batch, ctx)
    trained = {name: state.params[name] for name in grads}
    penalties = {} if keep_support else dict.fromkeys(connector.trained_weights, coefficients["alpha"])
    moved, adam = proximal_adam(trained, grads, state.adam, count, rate, penalties, b1)
    if keep_support:
        moved |= {name: jnp.where(trained[name] != 0, moved[name], 0) for name in connector.trained_weights}
    counted = jnp.minimum(state.fired, 2**30) + fired
    return FitState({**state.params, **moved}, adam, counted), terms


_step = jax.jit(_stepped, static_argnums=(0, 1), donate_argnums=2)


@partial(jax.jit, static_argnums=0)
def _summary(connector: Connector, params: Params) -> dict[str, jax.Array]:
    weights = [params[name] for name in connector.trained_weights]
    nonzero = sum(jnp.sum((w != 0).astype(jnp.float32)) for w in weights)
    return {"weight_l1_norm": connector.weight_l1(params), "nonzero": nonzero / sum(w.size for w in weights)}


def _check_finite(pair: Pair, scales: Scales) -> None:
    for name, units in (("inputs", scales.input_norm), ("targets", scales.target_scale)):
        if not np.all(np.isfinite(units)) or np.any(units <= 0):
            raise InputError(
                f"units of the {name} ({getattr(pair, name).name}) are not finite and positive: are their codes finite?"
            )
    if not np.all(np.isfinite(scales.target_mean)):
        raise InputError(f"codes of the targets ({pair.targets.name}) are not all finite")
