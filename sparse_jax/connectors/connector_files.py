"""A trained connector on disk: `connector.json` (static choices, where it came from) and `params.safetensors`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sparse_jax.connectors.connector import Trained, connector_from_json
from sparse_jax.dictionaries.files import write_with_card
from sparse_jax.dictionaries.protocol import to_json
from sparse_jax.errors import InputError

_CARD = "connector.json"


def save_connector(folder: str | Path, trained: Trained, provenance: dict) -> None:
    """Write a trained connector, whole or not at all.

    Args:
        folder: made if it does not exist.
        trained: the connector.
        provenance: JSON-able facts: model, sites, dictionaries, text, tokens, seed, ...
    """
    card = {"format": 1, "connector": to_json(trained.connector), "provenance": provenance}
    write_with_card(Path(folder), dict(trained.params), card, _CARD)


def read_connector_card(folder: str | Path) -> dict:
    """`connector.json` of a saved connector.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(folder) / _CARD
    if not path.is_file():
        raise InputError(f"{folder} holds no connector ({_CARD}); give the folder that save_connector wrote")
    try:
        card = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("connector"), dict):
        raise InputError(f"{path} is damaged: it describes no connector")
    return card


def load_connector(folder: str | Path) -> Trained:
    """A saved connector.

    Raises:
        InputError: there is none, a kind that is not known, or damaged files.
    """
    connector, path = connector_from_json(read_connector_card(folder)["connector"]), Path(folder) / "params.safetensors"
    try:
        params = {name: jnp.array(value) for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    due = {name: value.shape for name, value in jax.eval_shape(connector.init, jax.random.key(0)).items()}
    if (found := {name: value.shape for name, value in params.items()}) != due:
        raise InputError(f"{path} does not fit {_CARD} beside it: it holds {found}, due are {due}")
    return Trained(connector, params)
