"""Sites: the named places of a transformer block where activations are read or changed."""

import re
from dataclasses import dataclass

from sparse_jax.errors import InputError

# name -> what stands there. Shapes are those of one batch; `head_dim` = d_model / heads unless the config says else,
# `kv_head` = `head` where queries do not share keys and values.
SITES = {
    "resid_pre": "[batch, position, d_model] the residual stream as it enters the block",
    "attn_q": "[batch, position, head, head_dim] queries before rotary embedding (and before Qwen3's norm of them)",
    "attn_k": "[batch, position, kv_head, head_dim] keys before rotary embedding (and before Qwen3's norm of them)",
    "attn_v": "[batch, position, kv_head, head_dim] values",
    "attn_pattern": "[batch, head, query, key] attention weights after the softmax",
    "attn_z": "[batch, position, head, head_dim] values mixed by the pattern, before the output projection",
    "attn_out": "[batch, position, d_model] what attention adds to the residual stream",
    "resid_mid": "[batch, position, d_model] the residual stream between attention and MLP (sequential blocks only)",
    "mlp_in": "[batch, position, d_model] the MLP's input, after its layer norm with scale and bias",
    "mlp_hidden": "[batch, position, d_mlp] the MLP's neurons, as its last linear map gets them",
    "mlp_out": "[batch, position, d_model] what the MLP adds to the residual stream",
    "resid_post": "[batch, position, d_model] the residual stream as it leaves the block",
}

HEAD_SITES = ("attn_q", "attn_k", "attn_v", "attn_pattern", "attn_z")

TRANSFORMER_LENS_NAMES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "attn_q",
    "attn.hook_k": "attn_k",
    "attn.hook_v": "attn_v",
    "attn.hook_pattern": "attn_pattern",
    "attn.hook_z": "attn_z",
    "mlp.hook_post": "mlp_hidden",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model: `Site("resid_post", 3)`, written `resid_post.3`.

    Raises:
        InputError: the name is none of `SITES`.
    """

    name: str
    layer: int

    def __post_init__(self):
        if self.name not in SITES:
            raise _not_a_site(str(self))

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """A site from `resid_post.3` or from TransformerLens' name `blocks.3.hook_resid_post`.

        Raises:
            InputError: not of either form, or a name that is no site.
        """
        if isinstance(text, Site):
            return text
        if match := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", text):
            name = TRANSFORMER_LENS_NAMES.get(match[2])
            if name is None:
                raise InputError(
                    f"site {text!r}: no site here corresponds to TransformerLens' {match[2]!r}; "
                    f"known are {', '.join(TRANSFORMER_LENS_NAMES)}"
                )
            return cls(name, int(match[1]))
        match = re.fullmatch(r"(\w+)\.(\d+)", text)
        if not match:
            raise _not_a_site(text)
        return cls(match[1], int(match[2]))


def _not_a_site(text: str) -> InputError:
    return InputError(f"site {text!r}: give NAME.LAYER with NAME one of {', '.join(SITES)}")
