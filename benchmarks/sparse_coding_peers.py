"""The contestants of `benchmarks.sparse_coding`: ours, scikit-learn, a plain FISTA in PyTorch, SPAMS.

Each gets the same rows, atoms and lambda in the form that it is fastest with, and makes whatever else it needs (Gram
matrices, eigenvalues) within the time that is taken.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.coding.fista import fista_until
from sparse_jax.coding.lasso import duality_gap
from sparse_jax.coding.working_set import ITERATIONS, lasso

TOLERANCE = 1e-4
# Tolerances and iterations in a round, of which the first are taken whose median gap is within the above.
LOOSER = ((3e-2, 16), (3e-2, 24), (3e-2, 32), (1e-2, 24), (1e-2, 32), (1e-3, 32), (1e-4, 32))
# Iterations of FISTA at most, ours and in PyTorch; after how many PyTorch's gap is looked at.
MOST_ITERATIONS, LOOK_EVERY = 1000, 10


@dataclass(frozen=True)
class Problem:
    """min over c >= 0 of ||x - c W||^2 + penalty sum c, for each row of x.

    Attributes:
        x: `[rows, d]` float32.
        W: `[n, d]` float32, rows of length 1.
        penalty: lambda.
        l0: active features of the solution, mean over rows.
    """

    x: np.ndarray
    W: np.ndarray
    penalty: float
    l0: float

    def gaps(self, codes: np.ndarray) -> np.ndarray:
        """`[rows]` relative duality gaps of codes of the first rows, in float64."""
        with jax.enable_x64(True):
            x, W, c = (jnp.asarray(a, jnp.float64) for a in (self.x[: len(codes)], self.W, np.maximum(codes, 0)))
            return np.asarray(duality_gap(x, W, self.penalty, c))

    def fvu(self, codes: np.ndarray) -> float:
        """Share of the variance of the first rows that is left."""
        x = self.x[: len(codes)].astype(np.float64)
        return float(np.sum((x - codes @ self.W) ** 2) / np.sum((x - x.mean(0)) ** 2))


@dataclass(frozen=True)
class Contestant:
    """One way to solve a problem.

    Attributes:
        run: what is timed, given what `prepare` made.
        codes: `[rows, n]` out of what `run` returns; not timed.
        prepare: timed too, apart: it costs the same for any number of rows.
        rows: how many of the problem's rows are coded; times of `run` are scaled up to all. None: all.
        solves: whether it solves this problem, and its gap means something.
        slow: whether it is timed less often.
        note: what to say beside it.
    """

    run: Callable[[Any], Any]
    codes: Callable[[Any], np.ndarray] = np.asarray
    prepare: Callable[[], Any] = lambda: None
    rows: int | None = None
    solves: bool = True
    slow: bool = False
    note: str = ""


@partial(jax.jit, static_argnames="iterations")
def solve(x: jax.Array, W: jax.Array, penalty: float, tolerance: float, iterations: int = ITERATIONS) -> jax.Array:
    """Our codes; compiled once for every lambda and tolerance."""
    return lasso(x, W, penalty, tolerance, iterations=iterations).codes


def ours(problem: Problem, threads: int, slow_rows: int) -> dict[str, Contestant]:
    """Working sets, with every row's gap below 1e-4 and with the median's."""
    x, W = jnp.array(problem.x), jnp.array(problem.W)

    def to(tolerance, iterations=ITERATIONS):
        def run(_):
            return jax.block_until_ready(solve(x, W, problem.penalty, tolerance, iterations))

        return Contestant(run, note=f"tolerance {tolerance:g}, {iterations} iterations a round")

    contestants = (to(*how) for how in LOOSER)
    loose = next((each for each in contestants if _median_gap(problem, each) <= TOLERANCE), to(TOLERANCE))
    return {"sparse_jax lasso": to(TOLERANCE), "sparse_jax lasso, median": loose}


def _median_gap(problem: Problem, contestant: Contestant) -> float:
    return float(np.median(problem.gaps(contestant.codes(contestant.run(contestant.prepare())))))


def our_fista(problem: Problem, threads: int, slow_rows: int) -> dict[str, Contestant]:
    """FISTA on all atoms, until every row's gap is below 1e-4."""
    x, W = jnp.array(problem.x), jnp.array(problem.W)
    solve = jax.jit(lambda x, W, penalty: fista_until(x, W, penalty, TOLERANCE, max_iterations=MOST_ITERATIONS).codes)

    def run(_):
        return jax.block_until_ready(solve(x, W, problem.penalty))

    return {"sparse_jax fista_until": Contestant(run, slow=True, note=f"at most {MOST_ITERATIONS} iterations")}


def torch_fista(problem: Problem, threads: int, slow_rows: int) -> dict[str, Contestant]:
    """FISTA as in the paper, on all rows at once, for as many iterations as take the median gap below 1e-4."""
    import torch

    torch.set_num_threads(threads)
    x, W = torch.from_numpy(problem.x), torch.from_numpy(problem.W)

    @torch.inference_mode()
    def iterate(iterations, look):
        # The largest eigenvalue of W^T W, which is d x d, is that of W W^T.
        inverse = 1 / (2 * torch.linalg.eigvalsh(W.T @ W if W.shape[0] > W.shape[1] else W @ W.T)[-1].item())
        c = y = torch.zeros(x.shape[0], W.shape[0])
        t = 1.0
        for i in range(1, iterations + 1):
            gradient = 2 * (y @ W - x) @ W.T
            z = torch.relu(y - inverse * gradient - inverse * problem.penalty)
            following = (1 + (1 + 4 * t * t) ** 0.5) / 2
            y = z + ((t - 1) / following) * (z - c)
            c, t = z, following
            if look(i, c):
                break
        return c, i

    def near(i, c):
        return i % LOOK_EVERY == 0 and np.median(problem.gaps(c.numpy())) <= TOLERANCE

    c, needed = iterate(MOST_ITERATIONS, near)
    reached = np.median(problem.gaps(c.numpy())) <= TOLERANCE
    note = f"{needed} iterations" if reached else f"not reached in {MOST_ITERATIONS} iterations"
    run = Contestant(lambda _: iterate(needed, lambda i, c: False)[0], lambda c: c.numpy(), slow=True, note=note)
    return {"PyTorch FISTA": run}


def spams(problem: Problem, threads: int, slow_rows: int) -> dict[str, Contestant]:
    """SPAMS' LARS, in C++."""
    import spams

    def of(dtype, **options):
        x, D = (np.asfortranarray(a.T, dtype=dtype) for a in (problem.x, problem.W))

        def run(_):
            return spams.lasso(x, D=D, lambda1=problem.penalty / 2, mode=2, pos=True, numThreads=threads, **options)

        return Contestant(run, lambda codes: codes.T.toarray())

    return {
        "SPAMS": of(np.float32),
        "SPAMS, cholesky": of(np.float32, cholesky=True),
        "SPAMS, float64": of(np.float64),
    }


def scikit_learn(algorithm: str) -> Callable[[Problem, int, int], dict[str, Contestant]]:
    """`sparse_encode`, float64, with its own Gram matrix."""

    def make(problem, threads, slow_rows):
        from sklearn.decomposition import sparse_encode
        from sklearn.exceptions import ConvergenceWarning

        x, W = problem.x[:slow_rows].astype(np.float64), problem.W.astype(np.float64)
        if algorithm == "omp":
            options = {"n_nonzero_coefs": max(round(problem.l0), 1)}
        else:
            options = {"alpha": problem.penalty / 2, "positive": True, "max_iter": 10_000}

        def run(gram):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                # OMP warns of atoms that depend on each other; where it must stop is its own affair.
                warnings.simplefilter("ignore", RuntimeWarning)
                return sparse_encode(x, W, gram=gram, algorithm=algorithm, n_jobs=1, **options)

        contestant = Contestant(
            run,
            prepare=lambda: W @ W.T,
            rows=len(x),
            solves=algorithm != "omp",
            slow=True,
            note=f"k = {options['n_nonzero_coefs']}, of either sign" if algorithm == "omp" else "",
        )
        return {f"scikit-learn {algorithm}": contestant}

    return make


MAKERS = {
    "ours": ours,
    "fista": our_fista,
    "torch": torch_fista,
    "spams": spams,
    "lasso_cd": scikit_learn("lasso_cd"),
    "lasso_lars": scikit_learn("lasso_lars"),
    "omp": scikit_learn("omp"),
}
