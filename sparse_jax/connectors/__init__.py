"""Floor 4: maps from the features of one dictionary to those of another, and what such a map says.

collect_codes.py        codes of the same tokens at several sites, from one pass over a text
Linear ... Autoencoder  connectors: models from input codes to target codes, all behind one protocol
fit.py, linear_path.py  learnt by gradients with exact zeros; or solved from second moments, for a path of penalties
linearity.py            which targets no linear map explains, with intervals; original_rule.py, noise_threshold.py
formula.py, labels.py   a connection as a formula, and whether it is an OR, an AND or an AND-NOT
clusters.py             ways in which a hidden unit comes to fire
connection_pages.py     pages of targets and of hidden units
causal.py, spliced.py   does removing an input change the target as its weight says? does the model still work?
mean_jacobian.py, virtual_weights.py      weights that follow from the model, beside the learnt ones
attention_maps.py, attention_trios.py     features through attention's QK and OV circuits
jacobian_sae.py         two dictionaries around an MLP, trained with a penalty on the Jacobian between them
"""

# Importing a connector makes it known by name.
from sparse_jax.connectors.autoencoder import AutoencoderConnector
from sparse_jax.connectors.connector import CONNECTORS, Connector, Trained
from sparse_jax.connectors.connector_files import load_connector, save_connector
from sparse_jax.connectors.deep_mlp import DeepMLP
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.mlp_on_linear import MLPOnLinear
from sparse_jax.connectors.paired_codes import CodeStore, Pair, SiteCodes
from sparse_jax.connectors.relu_linear import ReLULinear

__all__ = [
    "CONNECTORS",
    "MLP",
    "AutoencoderConnector",
    "CodeStore",
    "Connector",
    "DeepMLP",
    "Linear",
    "MLPOnLinear",
    "Pair",
    "ReLULinear",
    "SiteCodes",
    "Trained",
    "load_connector",
    "save_connector",
]
