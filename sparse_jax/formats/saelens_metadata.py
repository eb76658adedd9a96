"""What SAELens' `cfg.json` says about where a dictionary came from, in their words and in ours.

hook_name <-> site, hook_head_index <-> head, prepend_bos <-> bos "row" / "none", context_size <-> context, seqpos_slice
<-> skip_positions, model_name <-> model, model_from_pretrained_kwargs <-> revision, dataset_path <-> text.

Version 6 has them under "metadata", earlier ones beside the static choices. Coefficients of training stay where
they are.
"""

from typing import Any

from sparse_jax.dictionaries.protocol import Dictionary, to_json
from sparse_jax.errors import InputError
from sparse_jax.lm.sites import TRANSFORMER_LENS_NAMES, Site

# The version whose format is written.
VERSION = "6.54.12"

HOOKS = {name: hook for hook, name in TRANSFORMER_LENS_NAMES.items()}

# What they call the architecture a dictionary was trained as, where it is saved as another.
TRAINED_AS = {"batch-topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}

# What versions before 6 called by other names.
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
STATIC = (
    "architecture d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations "
    "k rescale_acts_by_decoder_norm"
).split()


def to_metadata(dictionary: Dictionary, provenance: dict) -> dict[str, Any]:
    """Metadata of a dictionary of ours; what they have no word for is under "sparse_jax".

    Raises:
        InputError: a site at which TransformerLens has no hook.
    """
    site, bos, skip = (provenance.get(name) for name in ("site", "bos", "skip_positions"))
    found = {
        "model_name": provenance.get("model"),
        "hook_name": None if site is None else _hook(Site.parse(site)),
        "hook_head_index": provenance.get("head"),
        "context_size": provenance.get("context"),
        "prepend_bos": {"row": True, "none": False}.get(bos),
        "seqpos_slice": None if skip is None else [skip, None],
        "dataset_path": provenance.get("text"),
        "model_from_pretrained_kwargs": {"revision": provenance["revision"]} if provenance.get("revision") else None,
        "training_architecture": TRAINED_AS.get(dictionary.kind),
    }
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        **{name: value for name, value in found.items() if value is not None},
        "sparse_jax": {"dictionary": to_json(dictionary), "provenance": provenance},
    }


def _hook(site: Site) -> str:
    if site.name not in HOOKS:
        raise InputError(f"site {site}: TransformerLens has no hook there; it has one for {', '.join(HOOKS)}")
    return f"blocks.{site.layer}.{HOOKS[site.name]}"


def to_provenance(cfg: dict) -> dict[str, Any]:
    """Provenance from a (modern) `cfg.json`: what was given to `to_metadata`, or theirs translated."""
    metadata = cfg.get("metadata") or {}
    ours = metadata.get("sparse_jax")
    if isinstance(ours, dict) and isinstance(ours.get("provenance"), dict):
        return ours["provenance"]
    seqpos = metadata.get("seqpos_slice") or [None]
    found = {
        "model": metadata.get("model_name"),
        "revision": (metadata.get("model_from_pretrained_kwargs") or {}).get("revision"),
        "site": _site(metadata.get("hook_name")),
        "head": metadata.get("hook_head_index"),
        "context": metadata.get("context_size"),
        "bos": {True: "row", False: "none"}.get(metadata.get("prepend_bos")),
        # A slice that only leaves out the first positions is what we have a word for.
        "skip_positions": seqpos[0] if len(seqpos) > 1 and not any(seqpos[1:]) else None,
        "text": metadata.get("dataset_path"),
    }
    return {name: value for name, value in found.items() if value is not None} | {"saelens": metadata}


def _site(hook: str | None) -> str | None:
    try:
        return None if hook is None else str(Site.parse(hook))
    except InputError:
        return None


def modern(cfg: dict) -> dict:
    """`cfg.json` of any version as version 6 writes it."""
    if isinstance(cfg.get("metadata"), dict):
        return cfg
    cfg = {RENAMED.get(name, name): value for name, value in cfg.items()}
    cfg.setdefault("architecture", "standard")
    activation = cfg.get("activation_fn", "relu")
    if activation == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise InputError(f"cfg.json: activation_fn {activation!r} has no counterpart here; relu and topk have")
    normalise = cfg.get("normalize_activations") or "none"
    cfg["normalize_activations"] = "expected_average_only_in" if normalise is True else normalise
    cfg.setdefault("prepend_bos", True)
    metadata = {name: value for name, value in cfg.items() if name not in STATIC}
    return {name: cfg[name] for name in STATIC if name in cfg} | {"metadata": metadata}
