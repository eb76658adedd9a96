"""One training step of a connector against a plain PyTorch loop of the same model, in one process: ratios of times.

    make bench-peers        or, where torch is installed:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.connectors --connector mlp

Both begin with the sparse codes of the batch's tokens on the host and end with new parameters. PyTorch's side is
written as a researcher would: codes put into dense rows, a module, the squared error plus the l1 norm of the weights,
`backward()`, Adam. Ours prepares the batch (`PairBatches`) and takes the trainer's step. They take turns, batch by
batch, and medians are compared. CPU time counts all threads: under other load it is the steadier of the two figures.
Ratio above 1: ours is faster. Codes are random, features as frequent as 1 / rank^0.7.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from experiments import command
from sparse_jax.connectors.autoencoder import AutoencoderConnector
from sparse_jax.connectors.connector import Connector
from sparse_jax.connectors.deep_mlp import DeepMLP
from sparse_jax.connectors.fit_run import FitOptions, FitRun, Member
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.connectors.relu_linear import ReLULinear
from sparse_jax.connectors.scaling import scales_of
from sparse_jax.numerics.allocator import keep_freed_memory

ALPHA = 1e-3


@dataclass(frozen=True)
class Flags:
    """One training step of a connector against PyTorch's."""

    connector: Literal["all", "linear", "relu-linear", "mlp", "deep-mlp", "autoencoder"] = "all"
    """Which model; all: linear, mlp and autoencoder."""
    features: int = 2048
    """Features on both sides."""
    active: int = 32
    """Active features of a token, on both sides."""
    width: int = 0
    """Hidden codes; 0: the connector's default."""
    batch: int = FitOptions.batch
    """Tokens in a step."""
    repeats: int = 9
    """Steps of each side that are timed."""
    threads: int = 2
    """Threads of PyTorch; JAX takes all cores."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


KINDS = {
    "linear": Linear,
    "relu-linear": ReLULinear,
    "mlp": MLP,
    "deep-mlp": DeepMLP,
    "autoencoder": AutoencoderConnector,
}


def main(flags: Flags) -> None:
    """Time both sides of each connector, print a table."""
    keep_freed_memory()
    pair = random_pair(flags)
    print(f"{flags.active} of {flags.features} features active on both sides, batches of {flags.batch}; us per token")
    print(f"{'connector':>20} {'ours':>8} {'CPU':>8} {'PyTorch':>8} {'CPU':>8} {'ratio':>7} {'of CPU':>7}")
    for kind in ("linear", "mlp", "autoencoder") if flags.connector == "all" else (flags.connector,):
        own = {"n_features": flags.width} if flags.width else {}
        connector = KINDS[kind](alpha=ALPHA, **own).sized(flags.features, flags.features)
        ours, theirs = timed([our_step(connector, pair, flags), torch_step(connector, pair, flags)], flags.repeats)
        unit = 1e6 / flags.batch
        figures = [unit * statistics.median(side[i]) for side in (ours, theirs) for i in (0, 1)]
        ratios = [statistics.median(b / a for a, b in zip(ours[i], theirs[i])) for i in (0, 1)]
        name = kind if "linear" in kind else f"{kind} {connector.n_features}"
        print(f"{name:>20}" + "".join(f" {each:8.1f}" for each in figures) + "".join(f" {r:7.2f}" for r in ratios))


def timed(sides: list[Callable[[int], object]], repeats: int) -> list[tuple[list[float], list[float]]]:
    """(seconds, CPU seconds) of the steps of each side, in turns."""
    taken = [([], []) for _ in sides]
    for i in range(-2, repeats):
        for side, (wall, cpu) in zip(sides, taken):
            time.sleep(0.02)  # threads that spin after their work let go
            begin = time.perf_counter(), time.process_time()
            side(i + 2)
            if i >= 0:
                wall.append(time.perf_counter() - begin[0])
                cpu.append(time.process_time() - begin[1])
    return taken


def random_pair(flags: Flags) -> Pair:
    """Codes of four batches of tokens."""
    rng, tokens = np.random.default_rng(0), 4 * flags.batch
    log_rate = -0.7 * np.log(np.arange(1, flags.features + 1))

    def site(name):
        # Gumbel noise: draws without replacement by the features' rates.
        noisy = rng.permutation(log_rate) + rng.gumbel(size=(tokens, flags.features))
        indices = np.argpartition(-noisy, flags.active, axis=1)[:, : flags.active].astype(np.int32)
        return SiteCodes(name, flags.features, rng.random(indices.shape).astype(np.float32) + 0.1, indices)

    place = np.arange(tokens)
    return Pair(site("in"), site("out"), Tokens(place, place // 100, place // 100, place % 100))


def our_step(connector: Connector, pair: Pair, flags: Flags) -> Callable[[int], object]:
    """The trainer's step, with the preparation of its batch."""
    run = FitRun.of(connector, pair, FitOptions(tokens=10**9, batch=flags.batch), [Member()], scales_of(pair))
    held = {"states": [run.start(0)]}

    def take(i):
        held["states"], terms = run.step(held["states"], run.batches[i], i)
        jax.block_until_ready((held["states"], terms))

    return take


def torch_step(connector: Connector, pair: Pair, flags: Flags) -> Callable[[int], object]:
    """A plain loop's step."""
    import torch

    torch.set_num_threads(flags.threads)
    n, width = flags.features, connector.n_features
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    model = {
        "linear": lambda: [linear(n, n)],
        "relu-linear": lambda: [linear(n, n), relu()],
        "mlp": lambda: [linear(n, width), relu(), linear(width, n)],
        "autoencoder": lambda: [linear(n, width), relu(), linear(width, n)],
        "deep-mlp": lambda: [linear(n, width), relu(), linear(width, width), relu(), linear(width, n)],
    }[connector.kind]()
    weights = [layer.weight for layer in model if hasattr(layer, "weight")]
    model = torch.nn.Sequential(*model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pair))

    def dense(site, rows):
        values, indices = (torch.from_numpy(a) for a in site.at(rows))
        return torch.zeros(len(rows), n).scatter_(1, indices.long(), values)

    def take(i):
        rows = order[np.arange(i * flags.batch, (i + 1) * flags.batch) % len(pair)]
        x, y = dense(pair.inputs, rows), dense(pair.targets, rows)
        hidden = model[:2](x) if connector.kind == "autoencoder" else None
        y_hat = model(x) if hidden is None else model[2](hidden)
        loss = (y_hat - y).square().sum(-1).mean() + ALPHA * sum(w.abs().sum() for w in weights)
        if hidden is not None:
            loss = loss + 0.1 * hidden.sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return take


if __name__ == "__main__":
    command.main(Flags, main)
