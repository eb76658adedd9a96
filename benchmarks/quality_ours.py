"""Our own trainer for `benchmarks.quality`: what `experiments.train_sae` does, on the stored stream.

Everything that is not the trial's is `train_sae`'s default: normaliser, schedule, dead window, initialisation, and the
controller that holds the wished L0 of those architectures that have a coefficient to move.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality_trial import BATCH, Trained, Trial
from experiments.train_sae import Flags
from sparse_jax.activations import Statistics
from sparse_jax.activations.normalise import fit_normaliser
from sparse_jax.dictionaries import (
    L1,
    BatchTopK,
    Gated,
    JumpReLU,
    Lp,
    MatchingPursuit,
    Matryoshka,
    MultiTopK,
    Normalised,
    TopK,
)
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training import adam, init_state, make_step, settings_for

ARCHITECTURES = {
    "standard": L1,
    "topk": TopK,
    "batch-topk": BatchTopK,
    "jump-relu": JumpReLU,
    "gated": Gated,
    "matryoshka": Matryoshka,
    "lp": Lp,
    "multi-topk": MultiTopK,
    "matching-pursuit": MatchingPursuit,
}


def train(trial: Trial, batch_of: Callable[[int], np.ndarray], statistics: Statistics, n_features: int) -> Trained:
    """Train; the trial's sparsity is k, or the L0 that the controller holds."""
    flags = Flags(L1())
    width = len(statistics.mean)
    architecture = ARCHITECTURES[trial.architecture]
    held = architecture().sparsity_coefficient is not None
    chosen = {} if held else {"k": round(trial.sparsity)}
    dictionary = architecture(n_features=n_features, **chosen).sized(width, compute_dtype=fast_dtype())
    optimisation = adam(trial.learning_rate)
    state = init_state(
        dictionary,
        optimisation.transform,
        fit_normaliser(flags.normalise, statistics.mean, statistics.variance),
        trial.seed,
        settings_for(dictionary, optimisation, trial.sparsity if held else None),
    )
    window = min(flags.dead_window, trial.steps * BATCH // 4)
    step = make_step(dictionary, optimisation, flags.schedule, trial.steps, window)
    weight = jnp.ones(BATCH)
    started = time.perf_counter()
    for number in range(trial.steps):
        state, metrics = step(state, jnp.array(batch_of(number)), weight)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    scaled = {} if window == flags.dead_window else {"dead_window": f"{flags.dead_window} -> {window} tokens"}
    log = {"compute_dtype": dictionary.compute_dtype, **{name: float(value) for name, value in metrics.items()}}
    return Trained(Normalised(dictionary, state.params, state.normaliser), seconds, scaled, log)
