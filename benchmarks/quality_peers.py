"""SAELens' and dictionary_learning's own trainers on activations that are handed over, for `benchmarks.quality`.

Each is used as its documentation and scripts use it; only the sizes, the number of steps, the batch of 1,024, the
learning rate, the sparsity knob, the seed and the device are ours. What a library states in steps or tokens is brought
down to a quarter of the run where it exceeds that, and every such change is listed. The dictionary that comes out is
converted into ours and must, on a batch of raw activations, do what the library's own inference does.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from benchmarks.quality_trial import BATCH, Trained, Trial, WithinAQuarter
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError

# Knobs that are the number of active features itself.
SPARSITY_IS_L0 = frozenset(
    {(library, kind) for library in ("saelens", "dictionary_learning") for kind in ("topk", "batch-topk", "matryoshka")}
    | {("dictionary_learning", "jump-relu")}
)
# Knobs from which to search for an L0 of about 32: from runs of 200 to 400 steps on the embedded model's resid_post.3
# with 2,048 features and a learning rate of 1e-3.
FIRST_SPARSITY = dict.fromkeys(SPARSITY_IS_L0, 32.0) | {
    ("dictionary_learning", "standard"): 0.165,
    ("dictionary_learning", "gated"): 0.4,
    ("saelens", "standard"): 5.0,
    ("saelens", "gated"): 6.5,
    ("saelens", "jump-relu"): 3.7,
}

# What conversion may cost, relative to the largest entry; and the share of codes that may fall on the other side of a
# threshold for it.
TOLERANCE, FLIPS = 1e-4, 1e-5


def train(
    trial: Trial,
    batch_of: Callable[[int], np.ndarray],
    *,
    width: int,
    n_features: int,
    mean: np.ndarray,
    mean_norm: float,
    mean_square: float,
) -> Trained:
    """Train with the library's own trainer; convert and check.

    Args:
        trial: what to do; its library is "saelens" or "dictionary_learning".
        batch_of: step -> `[1024, width]` float32 raw activations.
        width: of the activations.
        n_features: of the dictionary.
        mean: `[width]`, `mean_norm`, `mean_square`: of the activations x: E x, E ||x||, E ||x||^2. The libraries
            estimate the one that they divide by from about as many batches as they train on; here it is given.

    Raises:
        InputError: another library.
        RuntimeError: the conversion does not do what the library's own inference does.
    """
    within = WithinAQuarter(trial.steps)
    if trial.library == "dictionary_learning":
        from benchmarks import quality_dictionary_learning as peer

        scale = float(np.sqrt(mean_square))
        ae, seconds, told = peer.fit(trial, batch_of, width, n_features, scale, within)
        dictionary, params = peer.converted(trial, ae)
        trained = normalised(dictionary, params, scale)
        # Their codes are in raw units once the scale is folded into biases.
        check(trained, batch_of(0), *peer.inference(ae, batch_of(0), scale), unit=scale)
    elif trial.library == "saelens":
        from benchmarks import quality_saelens as peer

        made, seconds, told = peer.fit(trial, batch_of, width, n_features, mean_norm, within)
        trained = peer.converted(made)
        scale = float(trained.normaliser.scale)
        # Once the scale is folded into the weights, codes are as before where decoder rows carry the raw unit; the
        # TopK family rescales codes by the norms of decoder rows, so that codes carry it.
        unit = scale if trial.architecture in ("topk", "batch-topk", "matryoshka") else 1.0
        check(trained, batch_of(0), *peer.inference(made, batch_of(0)), unit=unit)
    else:
        raise InputError(f"no peer is called {trial.library!r}: choose saelens or dictionary_learning")
    return Trained(trained, seconds, within.scaled, {"told": told, "scale": scale})


def normalised(dictionary, params: dict[str, np.ndarray], scale: float) -> Normalised:
    """Ours, for raw activations that the library divided by `scale`."""
    params = {name: jnp.array(value, jnp.float32) for name, value in params.items()}
    return Normalised(dictionary, params, Normaliser(jnp.zeros(dictionary.d_in), jnp.float32(scale)))


def check(trained: Normalised, x: np.ndarray, codes: np.ndarray, x_hat: np.ndarray, unit: float) -> None:
    """That codes and reconstructions of `x [rows, width]` are the library's.

    Args:
        trained: ours.
        x: raw activations.
        codes: theirs `[rows, n_features]`.
        x_hat: theirs `[rows, width]`, raw.
        unit: their codes over ours.

    Raises:
        RuntimeError: they are not.
    """
    ours = np.asarray(trained.encode(jnp.array(x))) * unit
    far = np.abs(ours - codes) > TOLERANCE * np.abs(codes).max()
    flipped = (ours > 0) != (codes > 0)
    rows = ~np.any(far & flipped, axis=1)
    apart = np.abs(np.asarray(trained.reconstruct(jnp.array(x))) - x_hat)[rows].max(initial=0) / np.abs(x_hat).max()
    if not codes.any() or np.any(far & ~flipped) or np.mean(far & flipped) > FLIPS or not apart <= TOLERANCE:
        raise RuntimeError(
            f"{trained.dictionary.kind}: the conversion is not the library's dictionary: {far.sum()} of {far.size} "
            f"codes differ, {np.sum(far & flipped)} of them by a threshold; {np.count_nonzero(codes)} are active; "
            f"reconstructions are apart by {apart:.1e} of the largest entry"
        )


__all__ = ["BATCH", "FIRST_SPARSITY", "SPARSITY_IS_L0", "check", "train"]
