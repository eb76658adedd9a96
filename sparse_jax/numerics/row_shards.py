"""Work that takes each row by itself, on all devices of a mesh at once, without a word between them.

    rows of x over "data" x "features"  ->  each device: function(its rows, the rest whole)  ->  columns back over
                                                                                                 "features"

For solvers whose loops end where their rows are done: divided over features, every iteration would wait for sums over
devices, and all rows for the slowest. What it costs: the rest (a dictionary, say) whole on each device for as long as
it takes, and one exchange of the answer. Nothing of size `[batch, n]` is gathered.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec

from sparse_jax.numerics.axes import DATA, FEATURES, parts


def over_rows(function: Callable[..., jax.Array], x: jax.Array, *rest: jax.Array) -> jax.Array:
    """`function(x, *rest)` for a function of `x [rows, d]` to `[rows, n]` that takes each row by itself.

    The answer has its rows over "data" and, where they can be divided, its columns over "features".
    """
    rows = len(x)
    over = tuple(axis for axis in (DATA, FEATURES) if parts(axis) > 1)
    while rows % math.prod(map(parts, over)):
        over = over[:-1]
    local = jax.shard_map(
        function,
        in_specs=(PartitionSpec(over), *[PartitionSpec()] * len(rest)),
        out_specs=PartitionSpec(over),
        check_vma=False,
    )
    answer = local(x, *rest)
    data = DATA if rows % parts(DATA) == 0 and parts(DATA) > 1 else None
    features = FEATURES if answer.shape[1] % parts(FEATURES) == 0 and parts(FEATURES) > 1 else None
    return lax.with_sharding_constraint(answer, PartitionSpec(data, features))
