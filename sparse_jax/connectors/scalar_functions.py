"""How linear is each pair's scalar function: one input feature's code against one output feature's, all else fixed?

    functions = scalar_functions(lm, 3, (coder_in, coder_out), rows, numbers, functions=500)
    functions.shares()                     how many are constant, linear, a line with a jump (JumpReLU), neither
    functions.shares(functions.strong)     the same among those with a slope that matters

A token, an input feature and an output feature active on it are drawn. The input's code runs over its in-distribution
range, from 0 to a high quantile of its positive codes; the activation is the token's own, x - c_f d_f + t d_f (error
kept, as the authors do), or the reconstruction's; the MLP runs; the output is encoded by its TopK. Fits to the curve:

    R2 of a line, and of the best JumpReLU: 0 on a stretch from one end, a line on the rest; both of the whole curve
    the authors' rule: every residual below 0.01 (there of codes as they are, here of the output's own typical code)

A curve that hardly moves fits any line, and with a sparse Jacobian most do not move: the authors count those as linear.
Here they are a class of their own, and the shares are given for strong pairs too, by |J|.

Source: Farnik et al. 2025 (ICML), section 5.3 and the authors' `linear.py`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.connectors.folded_mlp import folded_mlp
from sparse_jax.connectors.jacobian_curves import check_coders, sandwich
from sparse_jax.connectors.jacobian_sae import At
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.rows import Rows

# Rows of text at once, curves at once, points of a curve.
ROWS_AT_ONCE, CURVES_AT_ONCE, POINTS = 8, 8, 64
# The high end of a feature's range: this quantile of its positive codes.
QUANTILE = 0.99
CLASSES = ("constant", "linear", "jump", "neither")


@dataclass(frozen=True, eq=False)
class ScalarFunctions:
    """Sampled functions, `[functions]` each unless said.

    Attributes:
        inputs, outputs: int32 features.
        slope: J of the pair on its token.
        codes: `[functions, points]` the input's code.
        curves: `[functions, points]` the output's code.
        size: the output's mean positive code: what curves are measured by.
        r2_line, r2_jump: of the best line, of the best line with a stretch of zeros; NaN where the curve is constant.
        worst_line, worst_jump: largest residual of these fits over `size`.
        strong: bool, |J| above the given share of the mean norm of J.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    slope: np.ndarray
    codes: np.ndarray
    curves: np.ndarray
    size: np.ndarray
    r2_line: np.ndarray
    r2_jump: np.ndarray
    worst_line: np.ndarray
    worst_jump: np.ndarray
    strong: np.ndarray

    def classes(self, tolerance: float = 0.01) -> np.ndarray:
        """The class of each, a number in CLASSES, by the authors' rule: no residual above `tolerance x size`.

        Constant: the whole curve stays within the tolerance of its mean.
        """
        spread = np.abs(self.curves - self.curves.mean(axis=1, keepdims=True)).max(axis=1) / self.size
        return np.select(
            [spread <= tolerance, self.worst_line <= tolerance, self.worst_jump <= tolerance], [0, 1, 2], default=3
        )

    def shares(self, among: np.ndarray | None = None, tolerance: float = 0.01) -> dict[str, float]:
        """Share of each class, all of them or `among [functions]` bool; NaN where there is none."""
        found = self.classes(tolerance)
        found = found if among is None else found[among]
        if not len(found):
            return dict.fromkeys(CLASSES, float("nan"))
        return {name: float(np.mean(found == number)) for number, name in enumerate(CLASSES)}


def scalar_functions(
    lm: LanguageModel,
    layer: int,
    coders: tuple[Normalised, Normalised],
    rows: Rows,
    numbers: np.ndarray,
    *,
    functions: int = 512,
    where: At = "input",
    strong: float = 0.01,
    seed: int = 0,
) -> ScalarFunctions:
    """Sample scalar functions on rows of text.

    Args:
        lm, layer, coders, rows, numbers: as in `jacobian_figures`. All rows are run, and their codes kept, so that the
            features' ranges are known: give some dozens of rows.
        functions: how many; each is a token and one active feature on either side, drawn uniformly.
        where: what stands beside the varied feature: the token's own input, or its reconstruction.
        strong: |J| above this times the mean Frobenius norm of J makes a function strong.
        seed: of the draw.

    Raises:
        InputError: dictionaries that do not fit; no token counts, or none on which both sides are active.
    """
    check_coders(lm, layer, coders)
    mlp = folded_mlp(lm, layer, coders[0].normaliser, coders[1].normaliser)
    found = []
    padded = np.concatenate([numbers, np.full(-len(numbers) % ROWS_AT_ONCE, -1, np.int64)])
    for start in range(0, len(padded), ROWS_AT_ONCE):
        tokens, targets, mask, _ = rows[padded[start : start + ROWS_AT_ONCE]]
        made = jax.device_get(_codes(lm, mlp, coders, jnp.array(tokens), layer, where))
        counted = (mask & (targets >= 0)).reshape(-1)
        found.append([each[counted] for each in made])
    x, values_in, inputs, values_out, outputs, J = (np.concatenate(parts) for parts in zip(*found))
    if not len(x) or not (ready := np.flatnonzero((values_in > 0).any(1) & (values_out > 0).any(1))).size:
        raise InputError("no token counts on which both dictionaries have an active feature: give other rows")
    generator = np.random.default_rng(seed)
    token = generator.choice(ready, functions)
    slots = [_draw_slot(generator, values[token] > 0) for values in (values_in, values_out)]
    f_in, f_out = inputs[token, slots[0]], outputs[token, slots[1]]
    high, size = _ranges(values_in, inputs, f_in, QUANTILE), _ranges(values_out, outputs, f_out, None)
    codes = high[:, None] * np.linspace(0, 1, POINTS)
    curves = _curves(mlp, coders, x[token], values_in[token, slots[0]], f_in, f_out, codes, where)
    slope = J[token, slots[1], slots[0]]
    mean_norm = np.sqrt((J.astype(np.float64) ** 2).sum(axis=(1, 2))).mean()
    r2_line, worst_line, r2_jump, worst_jump = fits(codes, curves)
    return ScalarFunctions(
        f_in, f_out, slope, codes, curves, size, r2_line, r2_jump, worst_line / size, worst_jump / size,
        np.abs(slope) > strong * mean_norm,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("layer", "where"))
def _codes(lm, mlp, coders, tokens, layer, where):
    """Where slopes are taken, and codes, features and J of the active features, of every token."""
    names = [f"{name}.{layer}" for name in ("mlp_in", "mlp_out")]
    found = forward(lm, tokens, capture=names, stop=layer + 1).captured
    x, y = (found[name].reshape(-1, found[name].shape[-1]) for name in names)
    made = sandwich(mlp, coders, x, y, where)
    values_in = jnp.take_along_axis(made.codes_in, made.here.inputs, axis=1)
    values_out = jnp.take_along_axis(made.codes_out, made.here.outputs, axis=1)
    return made.place, values_in, made.here.inputs, values_out, made.here.outputs, made.J


def _draw_slot(generator: np.random.Generator, on: np.ndarray) -> np.ndarray:
    """`[rows]` one of the True places of each row, uniformly."""
    return np.where(on, generator.random(on.shape), -1.0).argmax(axis=1)


def _ranges(values: np.ndarray, features: np.ndarray, wanted: np.ndarray, quantile: float | None) -> np.ndarray:
    """`[functions]` a quantile (None: the mean) of the positive codes of each wanted feature."""
    on = values > 0
    flat, of = values[on], features[on]
    order = np.argsort(of, kind="stable")
    flat, of = flat[order], of[order]
    unique, back = np.unique(wanted, return_inverse=True)
    parts = [flat[np.searchsorted(of, f) : np.searchsorted(of, f, side="right")] for f in unique]
    made = [np.mean(part) if quantile is None else np.quantile(part, quantile) for part in parts]
    return np.array(made, np.float64)[back]


def _curves(mlp, coders, x, value, f_in, f_out, codes, where) -> np.ndarray:
    """`[functions, points]` the output's code; a few functions at a time on the device."""
    into, out = coders

    @jax.jit
    def run(x, value, f_in, f_out, codes):
        def one(given):
            x, value, direction, feature, codes = given
            points = x + (codes - value)[:, None] * direction
            return out.dictionary.encode(out.params, mlp(points))[:, feature]

        return lax.map(one, (x, value, into.params["W_dec"][f_in], f_out, codes), batch_size=CURVES_AT_ONCE)

    given = (jnp.array(x), jnp.array(value), jnp.array(f_in), jnp.array(f_out), jnp.array(codes.astype(x.dtype)))
    return np.asarray(run(*given), np.float64)


def fits(t: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(R2 of the best line, its worst residual, R2 of the best JumpReLU, its worst residual), `[curves]` each.

    Args:
        t, y: `[curves, points]`.

    A JumpReLU is 0 up to a point (or from a point on) and a line elsewhere, which has three points at least. The best
    has the least squared error; without any zero at an end it is the line.
    """
    out = np.full((4, len(y)), np.nan)
    for number, (at, values) in enumerate(zip(t, y)):
        spread = np.sum((values - values.mean()) ** 2)
        residual = _residual(at, values)
        best = residual
        ahead = int(np.argmax(values != 0)) if values.any() else 0
        behind = int(np.argmax(values[::-1] != 0)) if values.any() else 0
        for low, high in ((ahead, len(values)), (0, len(values) - behind)):
            if high - low >= 3 and high - low < len(values):
                rest = _residual(at[low:high], values[low:high])
                if np.sum(rest**2) < np.sum(best**2):
                    best = rest
        worst = np.abs(residual).max(), np.abs(best).max()
        r2 = [1 - np.sum(each**2) / spread if spread > 0 else np.nan for each in (residual, best)]
        out[:, number] = r2[0], worst[0], r2[1], worst[1]
    return tuple(out)


def _residual(t: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the least-squares line leaves."""
    centred = t - t.mean()
    slope = centred @ y / max(centred @ centred, np.finfo(np.float64).tiny)
    return y - y.mean() - slope * centred
