"""What one device does of a training step on meshes of fake devices: operations, bytes and gathered sizes, counted.

    python -m benchmarks.sharded_cost

Prints a table in markdown. Counts are the compiler's (`cost_analysis` of the program of one device; a loop's body and
both sides of a branch count once). Times are not given: fake devices share the same cores.
"""

import os
import re

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, BatchTopK, TopK
from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.mesh import MeshShape, make_mesh, state_shardings

# Rows of one block (numerics/row_blocks.py), so that one device's program has no loop over blocks.
ROWS, D, N = 512, 256, 4096
SHAPES = ["data=1", "data=2", "features=2", "data=2,features=2", "data=8", "data=4,features=2", "data=2,features=4"]
SHAPES += ["features=8"]


def compiled(dictionary: Dictionary, shape: MeshShape) -> jax.stages.Compiled:
    """The step of a dictionary on so many fake devices."""
    mesh, optimisation = make_mesh(shape, jax.devices()[: shape.size]), adam(1e-3)
    normaliser = Normaliser(jnp.zeros(D), jnp.ones(()))
    settings = settings_for(dictionary, optimisation)
    state = jax.eval_shape(lambda: init_state(dictionary, optimisation.transform, normaliser, 0, settings))
    step = make_step(dictionary, optimisation, Schedule(), 100, 1000, mesh=mesh)
    shapes = jax.ShapeDtypeStruct((ROWS, D), jnp.float32), jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    assert jax.tree.structure(state_shardings(mesh, state)) == jax.tree.structure(state)
    return step.lower(state, *shapes).compile()


def collective_shapes(text: str, kinds: str) -> list[tuple[int, ...]]:
    """Shapes of what collectives of some kinds (a regular expression) give, in the text of a compiled program."""
    text = re.sub(r"/\*.*?\*/", "", text)  # "/*index=5*/" stands in long tuples
    found = re.findall(rf"= ([^=]*?) (?:{kinds})(?:-start)?\(", text)
    shapes = [shape for each in found for shape in re.findall(r"\[([\d,]*)\]", each)]
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def kilobytes(text: str, kinds: str) -> float:
    """Of all that they give, at four bytes a number."""
    return sum(4 * int(np.prod(shape)) for shape in collective_shapes(text, kinds)) / 1e3


def main() -> None:
    """Print the table."""
    print(f"One step of {ROWS} rows, d {D}, {N} features.\n")
    print(
        "| dictionary | mesh | GFLOP a device | x devices | MB accessed | x devices | state MB | gathered kB | sum kB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for dictionary in (L1(n_features=N), TopK(n_features=N, k=32), BatchTopK(n_features=N, k=32)):
        first = None
        for shape in map(MeshShape.parse, SHAPES):
            program = compiled(dictionary.sized(D), shape)
            counts, text = program.cost_analysis(), program.as_text()
            flops, accessed = counts["flops"], counts["bytes accessed"]
            first = first or (flops, accessed)
            held = program.memory_analysis().argument_size_in_bytes
            print(
                f"| {dictionary.kind} | {shape} | {flops / 1e9:.3f} | {flops * shape.size / first[0]:.2f} "
                f"| {accessed / 1e6:.1f} | {accessed * shape.size / first[1]:.2f} | {held / 1e6:.2f} "
                f"| {kilobytes(text, 'all-gather'):.0f} | {kilobytes(text, 'all-reduce'):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
