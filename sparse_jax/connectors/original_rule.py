"""The original 'percent linear', in its own units, to stand beside `linearity`; it measures rarity as much.

    linear if (loss_linear,j - loss_mlp,j) / (norm_l / min norm)^2 < 0.001

loss_j is the mean over all tokens of (prediction - code)^2 for feature j in raw codes, norm_l a norm of the activations
of the layer that the codes are of, min norm the least of those of all layers that are compared.

Why a rare feature passes under any predictor: the loss is a mean over all tokens, on nearly all of which a rare feature
is 0. A constant 0 has a loss of p E[c^2 | it fires] for a feature that fires on a share p of tokens: with codes around
1 and p below 0.001 that is below the threshold before anything is predicted. So no difference of two predictors that
are at least as good as a constant can reach it. `constant_passes` counts the features of which this is so; they are
called linear whatever makes them. A unit of the codes that is small enough makes every feature pass.

Source: Riggs et al. 2023, "Finding Sparse Linear Connections between Features in LLMs", Alignment Forum.
"""

from dataclasses import dataclass

import numpy as np

from sparse_jax.errors import InputError

THRESHOLD = 0.001


@dataclass(frozen=True, eq=False)
class OriginalRule:
    """Figures of the original rule. Per target, `[targets]`.

    Attributes:
        difference: float64, (loss_linear - loss_mlp) / (norm / min norm)^2.
        linear: bool, the difference is below the threshold.
        constant_passes: bool, (loss_constant - loss_mlp) / (norm / min norm)^2 is too: the rule would call linear a
            feature of which the 'linear predictor' knows nothing.
        alive: bool, fires on these tokens; the others pass as well.
    """

    difference: np.ndarray
    linear: np.ndarray
    constant_passes: np.ndarray
    alive: np.ndarray

    @property
    def share(self) -> float:
        """Linear ones among all features, dead ones included, as in the original."""
        return float(self.linear.mean())

    @property
    def share_alive(self) -> float:
        """Linear ones among those that fire; NaN if none does."""
        return float(self.linear[self.alive].mean()) if self.alive.any() else float("nan")

    @property
    def share_constant(self) -> float:
        """Those that pass with a constant in place of the linear predictor, among those that fire."""
        return float(self.constant_passes[self.alive].mean()) if self.alive.any() else float("nan")


def original_rule(
    loss_linear: np.ndarray,
    loss_mlp: np.ndarray,
    loss_constant: np.ndarray,
    alive: np.ndarray,
    *,
    norm: float = 1.0,
    min_norm: float = 1.0,
    threshold: float = THRESHOLD,
) -> OriginalRule:
    """Which features the original rule calls linear.

    Args:
        loss_linear, loss_mlp, loss_constant: `[targets]` mean squared errors in squared raw units of the codes
            (`DocumentErrors.mse`, `Linearity.mse_linear`).
        alive: `[targets]` bool, fires on these tokens.
        norm: mean norm of the activations of this layer.
        min_norm: the least of those of all layers that are compared; both 1: no correction.
        threshold: 0.001 in the original.

    Raises:
        InputError: shapes that differ, or norms that are not 0 < min norm <= norm.
    """
    losses = [np.asarray(loss, np.float64) for loss in (loss_linear, loss_mlp, loss_constant)]
    if len({loss.shape for loss in losses} | {np.shape(alive)}) > 1 or losses[0].ndim != 1:
        raise InputError(
            f"losses of shapes {', '.join(str(list(loss.shape)) for loss in losses)}, alive {list(np.shape(alive))}: "
            "give one number a target each"
        )
    if not 0 < min_norm <= norm:
        raise InputError(f"norm {norm}, least norm {min_norm}: give 0 < least norm <= norm")
    linear, mlp, constant = (loss / (norm / min_norm) ** 2 for loss in losses)
    return OriginalRule(linear - mlp, linear - mlp < threshold, constant - mlp < threshold, np.asarray(alive, bool))
