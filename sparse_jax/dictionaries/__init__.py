"""Floor 2: dictionaries, one file an architecture, all behind one protocol; floors; files."""

from sparse_jax.dictionaries.baselines import PCA, Neurons, RandomDictionary
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.files import load, read_card, save
from sparse_jax.dictionaries.fista import Fista
from sparse_jax.dictionaries.fold import fold
from sparse_jax.dictionaries.gated import Gated
from sparse_jax.dictionaries.jump_relu import JumpReLU
from sparse_jax.dictionaries.l1 import L1
from sparse_jax.dictionaries.lista import Lista
from sparse_jax.dictionaries.lp import Lp
from sparse_jax.dictionaries.matching_pursuit import MatchingPursuit
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.multi_topk import MultiTopK
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
from sparse_jax.dictionaries.topk import TopK

__all__ = [
    "DICTIONARIES",
    "L1",
    "PCA",
    "Batch",
    "BatchTopK",
    "Context",
    "Dictionary",
    "Fista",
    "Gated",
    "JumpReLU",
    "Lista",
    "Losses",
    "Lp",
    "MatchingPursuit",
    "Matryoshka",
    "MultiTopK",
    "Neurons",
    "Normalised",
    "RandomDictionary",
    "TopK",
    "fold",
    "from_json",
    "load",
    "read_card",
    "register",
    "save",
    "to_json",
]
