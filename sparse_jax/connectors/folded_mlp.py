"""The MLP of one layer between two normalisers: from normalised input to normalised output, and its slopes.

    x = (raw input - c_x) / s_x    z_r = x W_r + b_r    h = hidden(z)    y = h W_out + b_out = (raw output - c_y) / s_y

    plain MLP (GPT-NeoX, GPT-2), one branch         h = act(z_0)        dh/dz_0 = act'(z_0)
    gated MLP (Llama, Mistral, Qwen), two branches  h = act(z_0) z_1    dh/dz_0 = act'(z_0) z_1,  dh/dz_1 = act(z_0)

Both normalisers are folded into the weights, so what follows knows of none. The input is the site `mlp_in`, behind the
layer norm. There the MLP is affine, elementwise, affine, which is why its Jacobian between features has a closed form;
from resid_pre the layer norm would mix all dimensions once more, with a slope that depends on every one of them.
Farnik et al. 2025 stand at the same place (`ln2.hook_normalized`).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Params
from sparse_jax.errors import InputError
from sparse_jax.lm.layers import activation
from sparse_jax.lm.model import LanguageModel, check_site

# The names of the arrays in the parameters of a Jacobian pair.
ARRAYS = ("W_in", "b_in", "W_out", "b_out")


@partial(jax.tree_util.register_dataclass, data_fields=list(ARRAYS), meta_fields=["activation"])
@dataclass(frozen=True)
class FoldedMlp:
    """A pytree: pass it to jitted functions as it is.

    Attributes:
        W_in: `[d_in, branches, d_mlp]`, one branch or two (gated).
        b_in: `[branches, d_mlp]`.
        W_out: `[d_mlp, d_out]`.
        b_out: `[d_out]`.
        activation: what a Hugging Face config calls it.
    """

    W_in: jax.Array
    b_in: jax.Array
    W_out: jax.Array
    b_out: jax.Array
    activation: str

    @property
    def branches(self) -> int:
        return self.W_in.shape[1]

    def preactivations(self, x: jax.Array) -> jax.Array:
        """`[rows, branches, d_mlp]` z of `x [rows, d_in]`."""
        flat = x @ self.W_in.reshape(self.W_in.shape[0], -1)
        return flat.reshape(-1, *self.b_in.shape) + self.b_in

    def hidden(self, z: jax.Array) -> jax.Array:
        """`[rows, d_mlp]` h."""
        bent = activation(self.activation)(z[:, 0])
        return bent if self.branches == 1 else bent * z[:, 1]

    def slopes(self, x: jax.Array) -> jax.Array:
        """`[rows, branches, d_mlp]` dh/dz at `x [rows, d_in]`."""
        z = self.preactivations(x)
        bent, slope = jax.jvp(activation(self.activation), (z[:, 0],), (jnp.ones_like(z[:, 0]),))
        return slope[:, None] if self.branches == 1 else jnp.stack([slope * z[:, 1], bent], axis=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[rows, d_out]` normalised output of normalised `x [rows, d_in]`."""
        return self.hidden(self.preactivations(x)) @ self.W_out + self.b_out

    def params(self, prefix: str = "mlp_") -> Params:
        """Its arrays by name."""
        return {prefix + name: getattr(self, name) for name in ARRAYS}


def from_params(params: Params, activation: str, prefix: str = "mlp_") -> FoldedMlp:
    """The inverse of `FoldedMlp.params`."""
    return FoldedMlp(*(params[prefix + name] for name in ARRAYS), activation)


def folded_mlp(lm: LanguageModel, layer: int, into: Normaliser, out: Normaliser) -> FoldedMlp:
    """The MLP of a layer, in float32, between the normalisers of `mlp_in` and of `mlp_out`.

    Raises:
        InputError: no such layer; a block without an MLP of a kind that is known here.
    """
    check_site(lm.config, f"mlp_in.{layer}")
    blocks = lm.params["blocks"]
    mlp = blocks.get("mlp", {})
    gated = set(mlp) == {"gate", "up", "down"}
    if not gated and set(mlp) != {"up", "down"}:
        raise InputError(
            f"the blocks of a {lm.config.model_type} model hold {', '.join(mlp) or 'no mlp'}: a Jacobian in closed "
            "form is known for MLPs of up and down, or of gate, up and down"
        )
    accurate = into.centre.dtype

    def array(branch: str, name: str, width: int) -> jax.Array:
        found = mlp[branch].get(name)
        return jnp.zeros(width, accurate) if found is None else found[layer].astype(accurate)

    d_mlp = mlp["up"]["kernel"].shape[-1]
    names = ("gate", "up") if gated else ("up",)
    W_in = jnp.stack([array(name, "kernel", d_mlp) for name in names], axis=1)
    b_in = jnp.stack([array(name, "bias", d_mlp) for name in names])
    W_out, b_out = array("down", "kernel", 0), array("down", "bias", mlp["down"]["kernel"].shape[-1])
    return FoldedMlp(
        # A normaliser's scale is one number, or one for each dimension.
        W_in=W_in * jnp.broadcast_to(into.scale, into.centre.shape)[:, None, None],
        b_in=b_in + jnp.einsum("d,drm->rm", into.centre, W_in),
        W_out=W_out / out.scale,
        b_out=(b_out - out.centre) / out.scale,
        activation=lm.config.activation,
    )
