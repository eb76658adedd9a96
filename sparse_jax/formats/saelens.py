"""SAELens' format: `cfg.json` (static choices and metadata) and `sae_weights.safetensors`. Source: sae-lens 6.54.12.

Ours                          theirs ("architecture")
l1 (relu), lp                 standard
gated                         gated
jump-relu                     jumprelu; threshold = exp(log_threshold)
topk, multi-topk              topk without rescale_acts_by_decoder_norm
matching-pursuit              matching_pursuit without its rules for stopping early (max_iterations = k); never folded
batch-topk, matryoshka        jumprelu, with one threshold for every feature, as SAELens itself saves them after
                              training; its checkpoints of training (batchtopk, matryoshka_batchtopk) are read

Weights have the same names and shapes in both libraries. `apply_b_dec_to_input` is our `centring`; a class that always
centres (TopK) gets b_enc + b_dec W_enc in its place. `rescale_acts_by_decoder_norm` multiplies pre-activations by the
norms of W_dec's rows and divides codes by them before decoding: reading moves the norms from W_dec to W_enc and b_enc,
which is the same.

The normaliser. "fold" puts it into the weights (fold.py), as SAELens does at the end of a training: whoever loads the
file gives it raw activations. "keep" leaves the weights as they were trained, and writes the normaliser where SAELens'
own checkpoints have theirs: a scale alone as "expected_average_only_in" with `activation_scaler.json`, a centre and
scale as "covariance_whitening" with a multiple of the identity in `activation_whitening.safetensors`. Mind that
SAELens' inference classes apply neither by themselves; its ActivationScaler does, before and after them.
Reading takes both. What has no counterpart here, because it depends on each row ("layer_norm", "constant_norm_rescale")
or has a matrix (other whitenings), is refused.

What the metadata say, and files of versions before 6: saelens_metadata.py.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.fold import fold
from sparse_jax.dictionaries.gated import Gated
from sparse_jax.dictionaries.jump_relu import JumpReLU
from sparse_jax.dictionaries.l1 import L1
from sparse_jax.dictionaries.matching_pursuit import MatchingPursuit
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.errors import InputError
from sparse_jax.formats.saelens_metadata import modern, to_metadata, to_provenance

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
# Its encoder is its decoder, and no W_enc is in the file.
TIED = "matching_pursuit"

Arrays = dict[str, np.ndarray]


def save_saelens(
    folder: str | Path, trained: Normalised, provenance: dict, normalisation: Literal["fold", "keep"] = "fold"
) -> None:
    """Write a dictionary for SAELens, whole or not at all: `cfg.json` comes last.

    Args:
        folder: made if it does not exist.
        trained: the dictionary.
        provenance: JSON-able facts, as in our own files: model, revision, site, context, bos, text, ...
        normalisation: "fold" the normaliser into the weights, or "keep" it beside them (see the head of this file).

    Raises:
        InputError: SAELens has no such architecture; no exact fold; a site that TransformerLens has no hook for.
    """
    if normalisation not in ("fold", "keep"):
        raise InputError(f"normalisation {normalisation!r}: choose fold or keep")
    dictionary, params, kept = trained.dictionary, trained.params, {"normalize_activations": "none"}
    files: dict[str, Arrays | dict] = {}
    if normalisation == "fold":
        dictionary, params = fold(dictionary, params, trained.normaliser)
    else:
        kept["normalize_activations"], files = _kept(trained.normaliser)
    writer = WRITERS.get(dictionary.kind)
    if writer is None:
        raise InputError(f"SAELens has no architecture for a {dictionary.kind} dictionary")
    cfg, weights = writer(dictionary, {name: np.asarray(value) for name, value in params.items()})
    cfg = {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "dtype": "float32",
        "device": "cpu",
        "reshape_activations": "none",
        **kept,
        **cfg,
        "metadata": to_metadata(trained.dictionary, provenance),
    }
    if (cfg["metadata"].get("hook_name") or "").endswith("hook_z") and "hook_head_index" not in cfg["metadata"]:
        # Theirs arrive as [..., head, head_dim]; ours are flattened already.
        cfg["reshape_activations"] = "hook_z"
    _write(Path(folder), {WEIGHTS: weights, **files, CFG: cfg})


def load_saelens(folder: str | Path) -> tuple[Normalised, dict]:
    """A dictionary that SAELens, or `save_saelens`, wrote; and where it came from, in our words.

    The provenance of our own files is what was given to `save_saelens`. Of others it is translated, and theirs is under
    "saelens", whole; "site" is left out where the hook is none of our sites.

    Raises:
        InputError: no such files, or damaged ones; an unknown architecture; missing keys, or weights of other shapes
            than the configuration says; a normalisation that cannot be represented.
    """
    folder = Path(folder)
    cfg = modern(_read_json(folder / CFG))
    architecture = _field(cfg, "architecture", str)
    if architecture not in READERS:
        raise InputError(f"{folder / CFG}: architecture {architecture!r} is not known; known are {', '.join(READERS)}")
    d_in, d_sae = _field(cfg, "d_in", int), _field(cfg, "d_sae", int)
    reader, vectors, scalars = READERS[architecture]
    weights = _read_arrays(folder / WEIGHTS)
    if "scaling_factor" in weights and not np.all(weights.pop("scaling_factor") == 1):
        raise InputError(f"{folder / WEIGHTS}: codes with a finetuned scaling_factor have no counterpart here")
    due = {} if architecture == TIED else {"W_enc": (d_in, d_sae)}
    due |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    due |= dict.fromkeys(vectors, (d_sae,)) | dict.fromkeys(scalars, ())
    found = {name: value.shape for name, value in weights.items()}
    if found != due:
        raise InputError(f"{folder / WEIGHTS} does not fit {CFG} beside it: it holds {found}, due are {due}")
    dictionary, params = reader(cfg, weights)
    params = {name: jnp.array(value, jnp.float32) for name, value in params.items()}
    return Normalised(dictionary.sized(d_in), params, _normaliser(folder, cfg, d_in)), to_provenance(cfg)


# Ours to theirs: (fields of cfg.json, weights) of a dictionary and its parameters.


def _encoder_and_decoder(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    """What all architectures share."""
    W_enc = params["W_dec"].T if getattr(dictionary, "tied", False) else params["W_enc"]
    b_dec = params.get("b_dec", np.zeros(dictionary.d_in, np.float32))
    centred = "b_dec" in params and getattr(dictionary, "centring", True)
    return {"apply_b_dec_to_input": centred}, {"W_enc": W_enc, "W_dec": params["W_dec"], "b_dec": b_dec}


def _write_standard(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    if dictionary.activation != "relu":
        raise InputError(f"SAELens has no architecture with {dictionary.activation}: its standard one has ReLU")
    cfg, weights = _encoder_and_decoder(dictionary, params)
    return cfg | {"architecture": "standard"}, weights | {"b_enc": params["b_enc"]}


def _write_gated(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    cfg, weights = _encoder_and_decoder(dictionary, params)
    return cfg | {"architecture": "gated"}, weights | {name: params[name] for name in ("b_gate", "b_mag", "r_mag")}


def _write_jumprelu(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    cfg, weights = _encoder_and_decoder(dictionary, params)
    threshold = np.exp(params["log_threshold"])
    return cfg | {"architecture": "jumprelu"}, weights | {"b_enc": params["b_enc"], "threshold": threshold}


def _write_topk(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    cfg, weights = _encoder_and_decoder(dictionary, params)
    k = min(dictionary.k, dictionary.n_features)
    cfg |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
    return cfg, weights | {"b_enc": params["b_enc"]}


def _write_matching_pursuit(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    stopping = {"residual_threshold": 0.0, "max_iterations": dictionary.k, "stop_on_duplicate_support": False}
    return {"apply_b_dec_to_input": True, "architecture": TIED, **stopping}, params


def _write_batchtopk(dictionary: Dictionary, params: Arrays) -> tuple[dict, Arrays]:
    if params["threshold"] < 0:
        raise InputError(
            f"this {dictionary.kind} dictionary has no threshold yet, so no rule for single rows: train it"
        )
    cfg, weights = _encoder_and_decoder(dictionary, params)
    threshold = np.full_like(params["b_enc"], params["threshold"])
    return cfg | {"architecture": "jumprelu"}, weights | {"b_enc": params["b_enc"], "threshold": threshold}


WRITERS: dict[str, Callable[[Dictionary, Arrays], tuple[dict, Arrays]]] = {
    "l1": _write_standard,
    "lp": _write_standard,
    "gated": _write_gated,
    "jump-relu": _write_jumprelu,
    "topk": _write_topk,
    "multi-topk": _write_topk,
    "matching-pursuit": _write_matching_pursuit,
    "batch-topk": _write_batchtopk,
    "matryoshka": _write_batchtopk,
}

# Theirs to ours: (static choices, parameters) of cfg.json and weights.


def _read_standard(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    # Their penalty is weighted by decoder norms, and their rows are free.
    return L1(n_features=cfg["d_sae"], centring=_centred(cfg), norm_weighted=True), weights


def _read_gated(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    return Gated(n_features=cfg["d_sae"], centring=_centred(cfg)), weights


def _read_jumprelu(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    weights = dict(weights)
    # They apply ReLU too, so that a threshold below 0 is one of 0.
    with np.errstate(divide="ignore"):
        weights["log_threshold"] = np.log(np.maximum(weights.pop("threshold"), 0))
    return JumpReLU(n_features=cfg["d_sae"], centring=_centred(cfg)), weights


def _read_topk(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    return TopK(n_features=cfg["d_sae"], k=_field(cfg, "k", int)), _always_centred(cfg, _rescaled(cfg, weights))


def _read_matching_pursuit(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    if cfg.get("residual_threshold", 0.01) != 0 or cfg.get("stop_on_duplicate_support", True) or not _centred(cfg):
        raise InputError(
            "a matching_pursuit that stops early (residual_threshold, stop_on_duplicate_support) or does not apply "
            "b_dec has no counterpart here: ours takes k steps from x - b_dec"
        )
    k = cfg["d_in"] if cfg.get("max_iterations") is None else _field(cfg, "max_iterations", int)
    return MatchingPursuit(n_features=cfg["d_sae"], k=k), weights


def _read_batchtopk(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    # Their k may be a fraction; once there is a threshold it only matters for further training.
    k = max(1, round(_field(cfg, "k", (int, float))))
    return BatchTopK(n_features=cfg["d_sae"], k=k), _with_threshold(cfg, weights)


def _read_matryoshka(cfg: dict, weights: Arrays) -> tuple[Dictionary, Arrays]:
    k, d_sae = max(1, round(_field(cfg, "k", (int, float)))), cfg["d_sae"]
    prefixes = tuple(width / d_sae for width in _field(cfg, "matryoshka_widths", list))
    return Matryoshka(n_features=d_sae, k=k, prefixes=prefixes), _with_threshold(cfg, weights)


# Reader, names of vectors [d_sae] beside the matrices and b_dec, names of scalars.
READERS: dict[str, tuple[Callable[[dict, Arrays], tuple[Dictionary, Arrays]], tuple[str, ...], tuple[str, ...]]] = {
    "standard": (_read_standard, ("b_enc",), ()),
    "gated": (_read_gated, ("b_gate", "b_mag", "r_mag"), ()),
    "jumprelu": (_read_jumprelu, ("b_enc", "threshold"), ()),
    "topk": (_read_topk, ("b_enc",), ()),
    "matching_pursuit": (_read_matching_pursuit, (), ()),
    "batchtopk": (_read_batchtopk, ("b_enc",), ("topk_threshold",)),
    "matryoshka_batchtopk": (_read_matryoshka, ("b_enc",), ("topk_threshold",)),
}


def _centred(cfg: dict) -> bool:
    return bool(cfg.get("apply_b_dec_to_input", True))


def _rescaled(cfg: dict, weights: Arrays) -> Arrays:
    """Weights that need no `rescale_acts_by_decoder_norm`: it is a training default of theirs."""
    trains = cfg["architecture"] != "topk"
    if not cfg.get("rescale_acts_by_decoder_norm", trains):
        return weights
    norms = np.linalg.norm(weights["W_dec"], axis=1)
    safe = np.where(norms > 0, norms, 1)
    return weights | {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / safe[:, None],
    }


def _always_centred(cfg: dict, weights: Arrays) -> Arrays:
    """Weights for a class that subtracts b_dec from its input, whether theirs did or not."""
    if _centred(cfg):
        return weights
    return weights | {"b_enc": weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]}


def _with_threshold(cfg: dict, weights: Arrays) -> Arrays:
    weights = _always_centred(cfg, _rescaled(cfg, weights))
    return {{"topk_threshold": "threshold"}.get(name, name): value for name, value in weights.items()}


# The normaliser.


def _kept(normaliser: Normaliser) -> tuple[str, dict[str, Arrays | dict]]:
    """(normalize_activations, files) that hold a normaliser beside the weights."""
    centre, scale = np.asarray(normaliser.centre, np.float64), float(normaliser.scale)
    if not centre.any():
        if scale == 1:
            return "none", {}
        return "expected_average_only_in", {SCALER: {"scaling_factor": 1 / scale, "has_whitening": False}}
    identity = np.eye(len(centre))
    whitening = {"mean": centre, "matrix": identity / scale, "inverse_matrix": identity * scale}
    return "covariance_whitening", {SCALER: {"scaling_factor": None, "has_whitening": True}, WHITENING: whitening}


def _normaliser(folder: Path, cfg: dict, d_in: int) -> Normaliser:
    rule = cfg.get("normalize_activations", "none")
    centre, scale = np.zeros(d_in), 1.0
    if rule in ("layer_norm", "constant_norm_rescale"):
        raise InputError(
            f"{folder / CFG}: normalize_activations {rule!r} divides each row by a number of its own, which no "
            "normaliser here does and no weights can hold"
        )
    if rule not in ("none", "expected_average_only_in", "covariance_whitening"):
        raise InputError(f"{folder / CFG}: normalize_activations {rule!r} is not known")
    if rule != "none" and not (folder / SCALER).is_file():
        raise InputError(
            f"{folder / CFG}: normalize_activations is {rule!r}, but {SCALER}, which says by how much, is not beside "
            "it; take the dictionary that SAELens saved at the end of training, into which it is folded"
        )
    if rule == "expected_average_only_in":
        scale = 1 / _field(_read_json(folder / SCALER), "scaling_factor", (int, float))
    if rule == "covariance_whitening":
        whitening = _read_arrays(folder / WHITENING)
        due = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
        if {name: value.shape for name, value in whitening.items()} != due:
            raise InputError(f"{folder / WHITENING} does not hold {due}")
        centre, scale = whitening["mean"], whitening["inverse_matrix"][0, 0]
        # Written by `save_saelens`, or a whitening that is one.
        if not np.array_equal(whitening["inverse_matrix"], scale * np.eye(d_in)):
            raise InputError(
                f"{folder / WHITENING} whitens with a matrix; a normaliser here has one scale. Take the dictionary "
                "that SAELens saved at the end of training, into which it is folded"
            )
    return Normaliser(jnp.array(centre, jnp.float32), jnp.array(scale, jnp.float32))


# Files.


def _write(folder: Path, files: dict[str, Arrays | dict]) -> None:
    """Write all files under temporary names, then rename them; the last one, `cfg.json`, makes them a dictionary."""
    # Before the folder is made, so that what JSON cannot say leaves nothing behind.
    texts = {name: json.dumps(content, indent=1) + "\n" for name, content in files.items() if name.endswith(".json")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name in texts:
            (folder / (name + ".tmp")).write_text(texts[name], encoding="utf8")
        else:
            # safetensors writes the buffer as it lies: a transposed view must be copied first.
            save_file({key: np.ascontiguousarray(value) for key, value in content.items()}, folder / (name + ".tmp"))
    # An old configuration must not stand beside new weights, not even for a moment; nor an old scaler, afterwards.
    for name in (CFG, SCALER, WHITENING):
        (folder / name).unlink(missing_ok=True)
    for name in files:
        os.replace(folder / (name + ".tmp"), folder / name)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise InputError(f"{path.parent} holds no SAELens dictionary: {path.name} cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    return content


def _read_arrays(path: Path) -> Arrays:
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    # float16 and bfloat16 fit into float32; float64 (thresholds, whitenings) stays until it is used.
    return {name: value if value.dtype == np.float64 else value.astype(np.float32) for name, value in arrays.items()}


def _field(content: dict, name: str, kind: type | tuple[type, ...]) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        raise InputError(f"{name!r} is {value!r} in a SAELens file where a {what} is due")
    return value
