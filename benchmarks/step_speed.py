"""One training step against other libraries' and against torch.compile, in the same process: ratios of times.

    make bench-peers        or, with everything that is to be compared installed:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.step_speed --architecture l1 --width 512 --features 2048

Contestants take turns, batch by batch, and medians are compared: whatever else the machine does slows all alike. Freed
memory is kept for all of them, threads are the same number. What a step is: gradients, Adam, the norm constraint where
there is one, firing counts; ours computes its metrics besides, and L1's torch.compile nothing but loss, gradients,
counts, clipping and Adam. A peer that is not installed is left out by name. Ratio above 1: ours is faster.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Dictionary, TopK
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.state import init_state, settings_for
from sparse_jax.training.step import adam, make_step

Contestant = Callable[[int], object]

BATCHES = 4
# No run is as long; no feature dies in one.
FOREVER = 10**9


@dataclass(frozen=True)
class Flags:
    """One training step against other libraries'."""

    architecture: Literal["l1", "topk"] = "l1"
    """What is trained."""
    width: int = 512
    """Width of the activations."""
    features: int = 2048
    """Size of the dictionary."""
    batch: int = 4096
    """Rows in a batch."""
    k: int = 32
    """Active features, for topk."""
    repeats: int = 9
    """Steps of each contestant that are timed."""
    threads: int = 2
    """Threads of PyTorch; JAX takes all cores."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


class _Autodiff:
    """Mixed into a dictionary's class: the same dictionary with the protocol's `value_and_grad`."""

    value_and_grad = Dictionary.value_and_grad


def main(flags: Flags) -> None:
    """Time every contestant, print a table."""
    keep_freed_memory()
    x = np.random.default_rng(0).normal(size=(BATCHES, flags.batch, flags.width)).astype(np.float32)
    contestants = {}
    for name, make in {**ours(flags), **PEERS[flags.architecture]}.items():
        try:
            contestants[name] = make(flags, x)
        except ImportError as error:
            print(f"left out: {name} ({error})")
            continue
        # Compiled at once: once SAELens is imported, torch.compile fails on what it did not see before.
        for i in range(2):
            contestants[name](i)
    times = in_turns(contestants, flags.repeats)
    first = times["sparse_jax"]
    print(f"{flags.architecture}, d {flags.width}, n {flags.features}, batch {flags.batch}, k {flags.k} (topk only)")
    print(f"{'step':>44} {'ms, median':>11} {'least':>7} {'its time / ours':>16}")
    for name, taken in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        # Turn by turn: both sides of a ratio met the same load.
        ratio = statistics.median(a / b for a, b in zip(taken, first))
        print(f"{name:>44} {1e3 * statistics.median(taken):11.1f} {1e3 * min(taken):7.1f} {ratio:16.2f}")


def in_turns(contestants: dict[str, Contestant], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contestant's steps, the order rotating."""
    names = list(contestants)
    times = {name: [] for name in names}
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(0.01)  # threads that spin after their work let go
            begin = time.perf_counter()
            contestants[name](i + 2)
            times[name].append(time.perf_counter() - begin)
    return times


def ours(flags: Flags) -> dict[str, Callable[[Flags, np.ndarray], Contestant]]:
    """The library's step as `train_sae` takes it, and the same by autodiff."""
    kind = {"l1": L1, "topk": TopK}[flags.architecture]
    by_autodiff = dataclass(frozen=True)(type("Autodiff", (_Autodiff, kind), {}))
    return {"sparse_jax": our_step(kind), "sparse_jax by autodiff": our_step(by_autodiff)}


def our_step(kind: type[Dictionary]) -> Callable[[Flags, np.ndarray], Contestant]:
    """The training step of a dictionary of this class, products in the fast dtype of the machine."""

    def make(flags, x):
        options = {"k": flags.k} if flags.architecture == "topk" else {}
        dictionary = kind(n_features=flags.features, **options).sized(flags.width, compute_dtype=fast_dtype())
        optimisation = adam(3e-4)
        normaliser = Normaliser(jnp.zeros(dictionary.d_in), jnp.ones(()))
        settings = settings_for(dictionary, optimisation)
        held = {"state": init_state(dictionary, optimisation.transform, normaliser, 0, settings)}
        step = make_step(dictionary, optimisation, Schedule(), 100_000, FOREVER)
        batches, weight = [jnp.array(each) for each in x], jnp.ones(flags.batch)

        def take(i):
            held["state"], metrics = step(held["state"], batches[i % BATCHES], weight)
            jax.block_until_ready((held["state"].params, metrics))

        return take

    return make


def torch_of(flags: Flags):
    import torch

    torch.set_num_threads(flags.threads)
    return torch


def compiled_l1(flags: Flags, x: np.ndarray) -> Contestant:
    """L1's loss in torch, compiled, under bfloat16 autocast, with fused Adam."""
    torch = torch_of(flags)
    start = {name: torch.from_numpy(np.array(value)) for name, value in _l1_parameters(flags).items()}
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    parameters = [torch.nn.Parameter(start[name]) for name in names]
    optimiser = torch.optim.Adam(parameters, lr=3e-4, fused=True)
    coefficient = L1().l1

    @torch.compile
    def loss(x, W_enc, b_enc, W_dec, b_dec):
        codes = torch.relu(x @ W_enc + (b_enc - b_dec @ W_enc))
        error = codes @ W_dec + b_dec - x
        return error.square().sum(-1).mean() + coefficient * codes.sum(-1).mean(), (codes > 0).float().sum(0)

    batches, fired = [torch.from_numpy(each) for each in x], torch.zeros(flags.features)

    def take(i):
        with torch.autocast("cpu", torch.bfloat16):
            value, counts = loss(batches[i % BATCHES], *parameters)
        fired.add_(counts.detach())
        value.backward()
        with torch.no_grad():  # the unit-norm constraint: tangent before the step, rows rescaled after
            W, g = parameters[2], parameters[2].grad
            g -= (g * W).sum(-1, keepdim=True) * W
        optimiser.step()
        with torch.no_grad():
            parameters[2] /= parameters[2].norm(dim=-1, keepdim=True)
        optimiser.zero_grad()

    return take


def _l1_parameters(flags):
    return L1(n_features=flags.features).sized(flags.width).init(jax.random.key(0))


def saelens(name: str, autocast: bool) -> Callable[[Flags, np.ndarray], Contestant]:
    """SAELens' trainer step of its training class `name`."""

    def make(flags, x):
        torch = torch_of(flags)
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        options = {"k": flags.k} if name == "TopK" else {"l1_coefficient": L1().l1}
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
            d_in=flags.width, d_sae=flags.features, device="cpu", **options
        )
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=FOREVER,
                train_batch_size_samples=flags.batch,
                lr=3e-4,
                lr_end=3e-4,
                device="cpu",
                autocast=autocast,
            ),
            getattr(sae_lens, f"{name}TrainingSAE")(config),
            iter([]),
        )
        batches = [torch.from_numpy(each) for each in x]
        return lambda i: trainer.step(batches[i % BATCHES])

    return make


def dictionary_learning(module: str, name: str) -> Callable[[Flags, np.ndarray], Contestant]:
    """dictionary_learning's trainer `name`, of its file `module`."""

    def make(flags, x):
        torch = torch_of(flags)
        import importlib

        trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
            steps=10**6,
            activation_dim=flags.width,
            dict_size=flags.features,
            layer=0,
            lm_name="none",
            device="cpu",
            **({"k": flags.k} if module == "top_k" else {}),
        )
        batches = [torch.from_numpy(each) for each in x]
        return lambda i: trainer.update(i + 1, batches[i % BATCHES])

    return make


PEERS = {
    "l1": {
        "torch.compile, bfloat16 autocast, fused Adam": compiled_l1,
        "SAELens": saelens("Standard", False),
        "SAELens, bfloat16 autocast": saelens("Standard", True),
        "dictionary_learning": dictionary_learning("standard", "StandardTrainer"),
    },
    "topk": {
        "SAELens": saelens("TopK", False),
        "SAELens, bfloat16 autocast": saelens("TopK", True),
        "dictionary_learning": dictionary_learning("top_k", "TopKTrainer"),
    },
}

if __name__ == "__main__":
    command.main(Flags, main)
