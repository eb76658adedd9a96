"""Bytes that a training step needs on each device: exact for what is kept, counted for what is made on the way.

With `P` the bytes of the trained parameters on a device, float32, of n / features of all features; r = batch / (data x
accumulate) rows at a time (a block of them on a lone CPU); m = n / (features x feature_chunks); a = 4 r m:

    parameters          as `state_shardings` lays them out, exactly: 4 (2 d n / features + ...) bytes
    learner state       the same of the optimiser's state: Adam has 2 P + 4
    other state         ages, counts, the normaliser
    while it steps      the most of (arrays x a + gradients x P) over the moments of a step that `STEPS` lists, and
                        3 arrays of rows of the reconstruction, its error and its gradient, 12 r d
    accumulated         P once more where batches are accumulated: the sums; and 4 rows d for all reconstructions
    batch               4 rows (d + 1) for the rows of a step on a device
    block               4 T d for the activations of a block, T = block_rows x context / data tokens, and as much again
                        for the block before its shuffle (or for the one that is read ahead)
    remembered          at most 1 GiB of blocks that stay in memory, over data
    language model      its parameters in float32, those axes over features that it divides
    its forward pass    one chunk of rows: 4 tokens (4 d_model + 3 d_mlp / parts) + 8 tokens context heads / parts

The counts in `STEPS` are what XLA's CPU compiler needed (`compiled.memory_analysis()`) in programs for 8 devices, in
float32 and bfloat16 alike to within a fifth; other compilers fuse otherwise. What is exact is tested as such, what is
counted to within a factor (tests/training/test_plan.py).
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sparse_jax.activations.blocks import CHUNK_ROWS, CHUNK_TOKENS
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.lm.family import family_of
from sparse_jax.lm.sharding import rules_over
from sparse_jax.lm.weight_map import Weight, leaves
from sparse_jax.numerics.axes import AXES, FEATURES
from sparse_jax.numerics.row_blocks import rows_in_block
from sparse_jax.training.mesh import state_shardings
from sparse_jax.training.state import TrainState, init_state, settings_for
from sparse_jax.training.step import adam

if TYPE_CHECKING:
    from sparse_jax.training.plan import Work

# Kind -> moments of a step, each as (arrays of [rows, features], sets of gradients) that are in memory together.
STEPS = {
    "l1": ((3.0, 1.0), (0.0, 2.0)),
    "jump-relu": ((4.0, 1.0), (0.0, 2.0)),
    "gated": ((4.5, 1.0), (0.0, 1.5)),
    "lp": ((5.5, 1.0), (0.0, 1.5)),
    "topk": ((3.5, 3.0),),  # with AuxK, whose gradients are made beside those that are there
    "batch-topk": ((5.5, 1.0), (3.5, 3.0)),
    "matryoshka": ((7.0, 2.0),),
}
# Of kinds that were not measured, as of the largest that were.
UNKNOWN = ((7.0, 3.0),)
# What `RememberedBlocks` keeps, at most.
REMEMBERED = 1 << 30


def abstract_mesh(work: "Work") -> AbstractMesh:
    """The mesh of the plan without its devices."""
    sizes = tuple(getattr(work.mesh, axis) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_state(work: "Work") -> TrainState:
    """Shapes of the state of one member; nothing is computed."""
    return _state_of(work.dictionary, work.optimiser)


@lru_cache(64)
def _state_of(dictionary: Dictionary, optimiser: Any) -> TrainState:
    optimisation = adam(1e-3)

    def make() -> TrainState:
        normaliser = Normaliser(jnp.zeros(dictionary.d_in, jnp.float32), jnp.ones((), jnp.float32))
        settings = settings_for(dictionary, optimisation)
        return init_state(dictionary, optimiser or optimisation.transform, normaliser, 0, settings)

    return jax.eval_shape(make)


def state_bytes(work: "Work") -> dict[str, int]:
    """Bytes on a device of the fields of the state: "params", "opt_state", and "rest"; of all members there."""
    state = abstract_state(work)
    shardings = state_shardings(abstract_mesh(work), state)

    def count(of: Any, over: Any) -> int:
        sizes = jax.tree.map(lambda leaf, sharding: leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape)),
                             of, over)  # fmt: skip
        return work.members_here * sum(jax.tree.leaves(sizes))

    made = {name: count(getattr(state, name), getattr(shardings, name)) for name in ("params", "opt_state")}
    return made | {"rest": count(state, shardings) - sum(made.values())}


def gradient_bytes(work: "Work") -> int:
    """P: bytes on a device of the gradients of the trained parameters of one member."""
    state = abstract_state(work)
    shardings = state_shardings(abstract_mesh(work), state)
    return sum(
        4 * math.prod(shardings.params[name].shard_shape(value.shape))
        for name, value in state.params.items()
        if name not in work.dictionary.frozen
    )


def rows_at_once(work: "Work", cpu: bool) -> int:
    """Rows that a device takes through the dictionary together."""
    rows = work.rows // work.accumulate
    return rows_in_block(rows) if cpu and work.mesh.data * work.mesh.features == 1 else rows


def step_bytes(work: "Work", cpu: bool = False) -> int:
    """Bytes on a device of what a step makes and drops: codes, gradients, reconstructions. Members take turns."""
    dictionary, rows = work.dictionary, rows_at_once(work, cpu)
    gradients = gradient_bytes(work)
    array = 4 * rows * dictionary.n_features // (work.mesh.features * work.feature_chunks)
    moments = STEPS.get(dictionary.kind, UNKNOWN)
    if work.sparse(cpu):  # pre-activations, block by block; then values and indices; AuxK
        moments = ((2.0, 3.0),)
    most = max(arrays * array + sets * gradients for arrays, sets in moments)
    made = round(most) + 12 * work.rows // work.accumulate * dictionary.d_out
    if work.accumulate > 1:
        made += gradients + 4 * work.rows * dictionary.d_out
    return made


def block_bytes(work: "Work") -> int:
    """Bytes on a device of one block of activations."""
    return 4 * work.block_rows * work.context * work.dictionary.d_in // work.mesh.data


def remembered_bytes(work: "Work") -> int:
    """Bytes on a device of blocks that stay in memory for the length of the run, at most."""
    return REMEMBERED // (block_bytes(work) * work.mesh.data) * block_bytes(work)


def parts_of(work: "Work", weight: Weight) -> int:
    """Over how many devices a parameter of the language model is divided."""
    rules = rules_over(abstract_mesh(work), FEATURES, model_axes(work))
    return math.prod(work.mesh.features for axis, _ in weight.axes if rules[axis] is not None)


def model_axes(work: "Work") -> set:
    """All logical axes of the language model, with their sizes."""
    config = work.config
    return {axis for _, weight in leaves(family_of(config.model_type).weights(config)) for axis in weight.axes}


def model_bytes(work: "Work") -> int:
    """Bytes on a device of the language model's parameters, float32 as `load` keeps them; all layers are loaded."""
    if work.config is None:
        return 0
    return 4 * sum(_count(work, path, weight, work.config.n_layers) // parts_of(work, weight)
                   for path, weight in _weights(work))  # fmt: skip


def block_parameters(work: "Work") -> tuple[int, int]:
    """(parameters of the layers that are run, those of them on one device)."""
    layers = work.site_layer + 1
    found = [(path, weight) for path, weight in _weights(work) if path[0] == "blocks"]
    whole = sum(_count(work, path, weight, layers) for path, weight in found)
    here = sum(_count(work, path, weight, layers) // parts_of(work, weight) for path, weight in found)
    return whole, here


def chunk_tokens(work: "Work") -> int:
    """Tokens that go through the language model together on a device."""
    rows = max(1, work.block_rows // work.mesh.data)
    fit = max(1, min(CHUNK_ROWS, CHUNK_TOKENS // work.context))
    return min(rows, fit) * work.context


def forward_bytes(work: "Work") -> int:
    """Bytes on a device of what the language model makes of one chunk."""
    if not work.harvests:
        return 0
    config, tokens = work.config, chunk_tokens(work)
    heads, neurons = divided_model(work)
    return 4 * tokens * (4 * config.d_model + 3 * neurons) + 8 * tokens * work.context * heads


def divided_model(work: "Work") -> tuple[int, int]:
    """(heads, neurons of the MLP) on one device."""
    rules = rules_over(abstract_mesh(work), FEATURES, model_axes(work))
    config, parts = work.config, work.mesh.features
    heads = config.n_heads // (parts if rules["heads"] is not None else 1)
    return heads, config.d_mlp // (parts if rules["d_mlp"] is not None else 1)


def _weights(work: "Work") -> list[tuple[tuple[str, ...], Weight]]:
    return list(leaves(family_of(work.config.model_type).weights(work.config)))


def _count(work: "Work", path: tuple[str, ...], weight: Weight, layers: int) -> int:
    return math.prod(weight.port_shape) * (layers if path[0] == "blocks" else 1)
