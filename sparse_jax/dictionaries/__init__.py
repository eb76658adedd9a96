"""Floor 2: dictionaries, one file an architecture, all behind one protocol; floors; files."""

from sparse_jax.dictionaries.baselines import PCA, Neurons, RandomDictionary
from sparse_jax.dictionaries.files import load, read_card, save
from sparse_jax.dictionaries.l1 import L1
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.protocol import (
    DICTIONARIES,
    Batch,
    Context,
    Dictionary,
    Losses,
    from_json,
    register,
    to_json,
)

__all__ = [
    "DICTIONARIES",
    "L1",
    "PCA",
    "Batch",
    "Context",
    "Dictionary",
    "Losses",
    "Neurons",
    "Normalised",
    "RandomDictionary",
    "from_json",
    "load",
    "read_card",
    "register",
    "save",
    "to_json",
]
