"""What plans say (training/plan.py) beside what is measured on this machine: a markdown table; and plans for pods.

    python -m benchmarks.plan_check                 steps of L1 and TopK in two sizes on this CPU, a minute or two
    python -m benchmarks.plan_check --pods          predictions for a Llama-2 7B layer on v5e and v5p, seconds

A row of the first: a step on one device without a mesh, as `train_sae` takes it. This CPU's rates are measured just
before (chips.py). Memory and operations are those of the compiled program; XLA counts the body of a loop (blocks of
rows) once, so operations are compared for batches of one block. Times: the median of some steps; what else runs slows
both sides, though not equally.
"""

import os
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from experiments import command
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Dictionary, TopK
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.chips import CHIPS, Chip, this_cpu
from sparse_jax.training.mesh import MeshShape
from sparse_jax.training.plan import Plan, Work, advice, plan

LLAMA_2_7B = LlamaConfig(32, 4096, 11008, 32, 32, 128, 32000, 4096)
# Of the layer that is read: the middle one.
LAYER = 15
POD_MESHES = ("data=1,features=8", "data=8,features=8", "data=16,features=16")


@dataclass(frozen=True)
class Flags:
    """Plans beside measurements."""

    pods: bool = False
    """Print predictions for pods instead: nothing is measured."""
    batch: int = 32_768
    """Tokens in a step on pods."""
    k: int = 64
    """Active features on pods."""
    repeats: int = 7
    """Steps that are timed."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> None:
    """Print the table."""
    if flags.pods:
        print("\n".join(pod_table(flags)))
        return
    keep_freed_memory()
    chip = this_cpu()
    print(
        f"this CPU: {chip.flops / 1e9:.0f} GFLOP/s in bfloat16, {chip.flops_float32 / 1e9:.0f} in float32, "
        f"{chip.bandwidth / 1e9:.1f} GB/s, {chip.selects / 1e6:.0f} M entries/s in top-k; "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print("\n".join(measured_table(flags, chip)))


def measured_table(flags: Flags, chip: Chip) -> list[str]:
    """Markdown: L1 and TopK, two sizes each."""
    rows = [
        "| step | bytes of state | planned | made in a step | planned | operations | planned | ms | planned | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    dtype = fast_dtype()
    for width, features, batch in ((256, 2048, 512), (512, 16384, 512)):
        for dictionary in (L1(n_features=features), TopK(n_features=features, k=32)):
            rows.append(_measured(flags, chip, dictionary.sized(width, compute_dtype=dtype), batch))
    return rows


def _measured(flags: Flags, chip: Chip, dictionary: Dictionary, batch: int) -> str:
    optimisation = adam(3e-4)
    normaliser = Normaliser(jnp.zeros(dictionary.d_in), jnp.ones(()))
    state = init_state(dictionary, optimisation.transform, normaliser, 0, settings_for(dictionary, optimisation))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    x, weight = jax.random.normal(jax.random.key(0), (batch, dictionary.d_in)), jnp.ones(batch)
    compiled = make_step(dictionary, optimisation, Schedule(), 10**5, 10**9).lower(state, x, weight).compile()
    taken = []
    for _ in range(flags.repeats + 2):
        begun = time.perf_counter()
        state, metrics = compiled(state, x, weight)
        jax.block_until_ready((state.params, metrics))
        taken.append(time.perf_counter() - begun)
    seconds = statistics.median(taken[2:])
    made = plan(Work(dictionary, batch=batch, block_rows=8), chip)
    most = made.flops[1]
    memory = compiled.memory_analysis().temp_size_in_bytes
    return (
        f"| {dictionary.kind}, d {dictionary.d_in}, n {dictionary.n_features:,}, batch {batch} | {_mb(kept)} | "
        f"{_mb(made.of('parameters') + made.of('learner state'))} | {_mb(memory)} | {_mb(made.of('while it steps'))} | "
        f"{compiled.cost_analysis()['flops']:.2e} | {most:.2e} | {1e3 * seconds:.0f} | {1e3 * made.step_seconds:.0f} | "
        f"{seconds / made.step_seconds:.1f} |"
    )


def pod_table(flags: Flags) -> list[str]:
    """Markdown: TopK at a layer of Llama-2 7B, 131k and 1M features, on 8, 64 and 256 chips of v5e and v5p."""
    rows = [
        "| features | chip | mesh | GB a chip | fits | ms: step | model | sending | tokens/s at most | fits with |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for features in (2**17, 2**20):
        for name in ("v5e", "v5p"):
            rows += [_pod(flags, features, CHIPS[name], MeshShape.parse(mesh)) for mesh in POD_MESHES]
    return rows


def _pod(flags: Flags, features: int, chip: Chip, mesh: MeshShape) -> str:
    dictionary = TopK(n_features=features, k=flags.k).sized(LLAMA_2_7B.d_model, compute_dtype="bfloat16")
    work = Work(dictionary, mesh, flags.batch, block_rows=128, context=1024, config=LLAMA_2_7B, site_layer=LAYER)
    made = plan(work, chip)
    parts = " | ".join(f"{1e3 * each:.0f}" for each in (made.step_seconds, made.model_seconds, made.sent_seconds))
    return (
        f"| {features:,} | {chip.name} | {mesh} ({mesh.size}) | {made.bytes / 1e9:.1f} of {chip.memory / 1e9:.0f} | "
        f"{'yes' if made.fits else 'no'} | {parts} | {_speed(made)} | {'' if made.fits else _least(made)} |"
    )


def _least(made: Plan) -> str:
    """Changes after which it fits, the first two that keep the devices, else the first that takes more."""
    found = [(says, other) for says, other in advice(made) if other.work.batch == made.work.batch]
    same = [each for each in found if each[1].work.mesh.size == made.work.mesh.size][:2]
    chosen = same or found[:1]
    return "; ".join(f"{says} ({_speed(other)} tokens/s)" for says, other in chosen) or "nothing that was tried"


def _speed(made: Plan) -> str:
    return f"{made.tokens_per_second:,.0f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    command.main(Flags, main)
