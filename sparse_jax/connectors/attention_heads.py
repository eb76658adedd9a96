"""One layer's attention by head, the norm before it folded into the weights; what a dictionary reads and writes.

    q_i = s_i x_i W_q + b_q      k_j = s_j x_j W_k + b_k      v_j = s_j x_j W_v + b_v
    logit_ij = score_scale  turn(q_i, i - j) . k_j            attn_out_i = b_o + sum over heads, j of A_ij v_j W_o

x is the raw residual stream that enters the block. The norm's gain, its centring and its bias are in the weights and
biases; what is left of it is one factor for each token, the norm's scale

    s = (mean((x - mean x)^2) + epsilon)^-1/2     layer norm; without the mean for RMSNorm

which is the live one where `norm_scale` is given the token's x. `turn` is the rotary embedding of the query at the
relative distance: the rotation at place i against that at place j. It leaves what is not turned (three quarters of a
head of Pythia's) as it is; without rotary embedding (GPT-2: positions are in the residual stream) it does nothing.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (QK and OV circuits, folded norms).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries import Normalised
from sparse_jax.dictionaries.fold import fold
from sparse_jax.errors import InputError
from sparse_jax.lm.families.llama import NO_WINDOW
from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rotary import Rotary, rotary_angles

_ARRAYS = ("W_q", "W_k", "W_v", "W_o", "b_q", "b_k", "b_v", "b_o")
_STATIC = ("layer", "score_scale", "rotary", "window", "epsilon", "centred", "qk_norm")


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclass(frozen=True)
class Heads:
    """Attention weights of one layer, float32 (float64 for a model that computes in it).

    Attributes:
        W_q: `[head, d_model, head_dim]`, the norm's gain and centring in it.
        W_k, W_v: `[kv_head, d_model, head_dim]`, likewise; head h reads kv_head h // (heads / kv_heads).
        W_o: `[head, head_dim, d_model]`.
        b_q, b_k, b_v: `[head or kv_head, head_dim]`, the norm's bias in them; no scale stands before them.
        b_o: `[d_model]`.
        layer: which.
        score_scale: what scores are multiplied with.
        rotary: the rotary embedding; None: none.
        window: positions that a query sees, its own included; None: all.
        epsilon, centred: of the norm; RMSNorm is not centred.
        qk_norm: queries and keys are normed by head (Qwen3): logits are no sums over features then.
    """

    W_q: jax.Array
    W_k: jax.Array
    W_v: jax.Array
    W_o: jax.Array
    b_q: jax.Array
    b_k: jax.Array
    b_v: jax.Array
    b_o: jax.Array
    layer: int
    score_scale: float
    rotary: Rotary | None
    window: int | None
    epsilon: float
    centred: bool
    qk_norm: bool

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.W_q.shape[0]

    @property
    def head_dim(self) -> int:
        """Numbers in a query."""
        return self.W_q.shape[2]

    def kv(self, head: int | jax.Array) -> int | jax.Array:
        """The key-value head that a query head reads."""
        return head // (self.W_q.shape[0] // self.W_k.shape[0])

    def check_logits(self) -> None:
        """Raises InputError where logits are no bilinear function of the residual stream given its scale."""
        if self.qk_norm:
            raise InputError(
                "this model norms each query and key head (Qwen3): an attention logit is no sum over pairs of features "
                "there; OV maps exist, QK maps and trios do not"
            )

    def check_head(self, head: int) -> None:
        """Raises InputError for a head that is not there."""
        if not 0 <= head < self.n_heads:
            raise InputError(f"head {head}: layer {self.layer} has heads 0 to {self.n_heads - 1}")


def heads_of(lm: LanguageModel, layer: int) -> Heads:
    """The attention weights of a layer, norm folded in.

    Raises:
        InputError: the model has no such layer.
    """
    cfg = lm.config
    if not 0 <= layer < cfg.n_layers:
        raise InputError(f"layer {layer}: the model has layers 0 to {cfg.n_layers - 1}")
    dtype = accurate_dtype(lm.dtype)
    block = jax.tree.map(lambda stacked: stacked[layer].astype(dtype), lm.params["blocks"])
    norm, attention = block["ln_attn"], block["attn"]
    centred = "bias" in norm
    made = {"W_o": attention["out"]["kernel"], "b_o": attention["out"].get("bias", jnp.zeros(cfg.d_model, dtype))}
    for name, (kernel, bias) in _projections(cfg.model_type, attention).items():
        folded = kernel * norm["scale"][:, None, None]
        if centred:
            folded = folded - jnp.mean(folded, axis=0, keepdims=True)
            added = jnp.einsum("d,dhk->hk", norm["bias"], kernel)
        else:
            added = jnp.zeros(kernel.shape[1:], dtype)
        made[f"W_{name}"] = jnp.moveaxis(folded, 1, 0)
        made[f"b_{name}"] = added if bias is None else bias + added
    score_scale = cfg.head_dim**-0.5 if getattr(cfg, "scale_scores", True) else 1.0
    if getattr(cfg, "scale_by_layer", False):
        score_scale /= layer + 1
    window = getattr(cfg, "windows", (NO_WINDOW,) * cfg.n_layers)[layer]
    return Heads(
        **made,
        layer=layer,
        score_scale=score_scale,
        rotary=getattr(cfg, "rotary", None),
        window=None if window == NO_WINDOW else window,
        epsilon=cfg.norm_epsilon,
        centred=centred,
        qk_norm=getattr(cfg, "qk_norm", False),
    )


def _projections(model_type: str, attention: dict) -> dict:
    """name -> (kernel `[d_model, head, head_dim]`, bias `[head, head_dim]` or None) of q, k and v."""
    if "qkv" not in attention:
        return {name: (attention[name]["kernel"], attention[name].get("bias")) for name in "qkv"}
    kernel, bias = attention["qkv"]["kernel"], attention["qkv"].get("bias")
    axis = 2 if model_type == "gpt_neox" else 1  # [d, head, 3, head_dim]; GPT-2: [d, 3, head, head_dim]
    take = lambda array, i, axis: None if array is None else lax.index_in_dim(array, i, axis, keepdims=False)  # noqa: E731
    return {name: (take(kernel, i, axis), take(bias, i, axis - 1)) for i, name in enumerate("qkv")}


def norm_scale(heads: Heads, x: jax.Array) -> jax.Array:
    """`[...]`: the norm's factor of each token of the raw residual stream `x [..., d_model]`."""
    if heads.centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return lax.rsqrt(jnp.mean(x * x, axis=-1) + heads.epsilon)


def turned(heads: Heads, q: jax.Array, distance: jax.Array) -> jax.Array:
    """Queries `q [..., head_dim]` turned by the rotary embedding at a distance (query place - key place).

    Args:
        heads: says how.
        q: `[..., head_dim]`.
        distance: integers that broadcast against `[...]`.
    """
    if heads.rotary is None:
        return q
    cos, sin = rotary_angles(heads.rotary, distance, q.dtype)
    half = cos.shape[-1]
    first, second, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    parts = first * cos - second * sin, second * cos + first * sin, rest
    shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], axis=-1)


def written_by(coder: Normalised) -> tuple[jax.Array, jax.Array]:
    """(`[n_features, d]` what a code of 1 adds, `[d]` what stands there without any: decoder bias and centre), raw.

    Raises:
        InputError: a decoder that is no sum of directions.
    """
    if "W_dec" not in coder.params:
        raise InputError(f"a {coder.dictionary.kind} dictionary is no sum of directions: give an autoencoder")
    offset = coder.decode(jnp.zeros((1, coder.dictionary.n_features), coder.params["W_dec"].dtype))[0]
    return coder.directions(), offset


def read_by(coder: Normalised) -> tuple[jax.Array, jax.Array]:
    """(`W [d, n_features]`, `b [n_features]`) with pre-activations x W + b of raw activations x.

    Of a gated dictionary those of its gate.

    Raises:
        InputError: an encoder of another form.
    """
    dictionary, params = fold(coder.dictionary, coder.params, coder.normaliser)
    if "W_enc" not in params:
        raise InputError(
            f"the encoder of a {dictionary.kind} dictionary has no pre-activations that are linear in what it reads: "
            "give an autoencoder"
        )
    W, b = params["W_enc"], params["b_enc" if "b_enc" in params else "b_gate"]
    if "b_dec" in params and getattr(dictionary, "centring", True):
        b = b - params["b_dec"] @ W
    return W, b
