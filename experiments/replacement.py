"""A saved dictionary put in place of the site it was trained on: what it belongs to, and where it replaces."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measuring import in_float32
from sparse_jax.activations import Statistics
from sparse_jax.dictionaries import Normalised, load, read_card
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, Site, check_site, site_width
from sparse_jax.metrics.replaced import ReplacedSums, replaced_sums
from sparse_jax.training import reconstructor

# The mask of a card that does not say which positions it leaves out: what `train_sae` leaves out by itself.
USUAL_SKIP = 1


@dataclass(frozen=True)
class Replacement:
    """A dictionary and where it stands in.

    Attributes:
        path: where it was read.
        trained: the dictionary, computing in float32.
        site: the site it was trained on.
        skip_positions: positions at the start of each row that its training mask left out.
        max_norm: the norm above which that mask left tokens out; infinite where it had no such limit.
        mean: `[width]` mean of its training activations, None where the run folder has no statistics.
    """

    path: Path
    trained: Normalised
    site: Site
    skip_positions: int
    max_norm: float
    mean: np.ndarray | None

    def sums(
        self, lm: LanguageModel, tokens: jax.Array, targets: jax.Array, counted: jax.Array, mask: jax.Array
    ) -> ReplacedSums:
        """Sums of some rows; `mask [rows, position]` is the text's mask, with this dictionary's `skip_positions`."""
        mean = None if self.mean is None else jnp.array(self.mean, jnp.float32)
        shift = self.trained.normaliser.centre if mean is None else mean
        rebuild, limit = reconstructor(self.trained), jnp.array(self.max_norm, jnp.float32)
        return replaced_sums(lm, self.site, tokens, targets, counted, mask, rebuild, shift, mean, limit)

    def facts(self) -> dict:
        """What replaces what, and where, for `config.json` and `metrics.json`."""
        return {
            "path": str(self.path),
            "kind": self.trained.dictionary.kind,
            "n_features": self.trained.dictionary.n_features,
            "site": str(self.site),
            "skip_positions": self.skip_positions,
            "max_norm": self.max_norm if np.isfinite(self.max_norm) else None,
        }


def read_provenance(path: Path) -> dict:
    """Where a saved dictionary came from, by its card.

    Raises:
        InputError: there is no dictionary, or its card does not name its site.
    """
    provenance = read_card(path).get("provenance")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("site"), str):
        raise InputError(f"the dictionary in {path} does not say which site it was trained on; give one that does")
    return provenance


def load_replacement(path: Path, provenance: dict, config: Any, weights_sha256: str, allow_other: bool) -> Replacement:
    """The dictionary, checked against the model it is to be used in.

    Args:
        path: run folder or dictionary folder.
        provenance: see `read_provenance`.
        config: the model's.
        weights_sha256: the model's; compared where the card has one.
        allow_other: do not mind other weights.

    Raises:
        InputError: the model has no such site, or one of another width; it has other weights than the dictionary was
            trained on; damaged files.
    """
    site = check_site(config, provenance["site"])
    width = site_width(config, site)
    due = provenance.get("weights_sha256")
    if due not in (None, weights_sha256) and not allow_other:
        raise InputError(
            f"the dictionary in {path} was trained on {provenance.get('model')!r} with weights {due[:12]}..., this "
            f"model has {weights_sha256[:12]}...: give its own --model and --revision, or --allow-other-model"
        )
    trained = in_float32(load(path))
    dictionary = trained.dictionary
    if (dictionary.d_in, dictionary.d_out) != (width, width):
        raise InputError(
            f"the dictionary in {path} reads {dictionary.d_in} and writes {dictionary.d_out} numbers, site {site} of "
            f"this model has {width}; give a dictionary of this model"
        )
    max_norm = provenance.get("max_norm")
    return Replacement(
        path,
        trained,
        site,
        int(provenance.get("skip_positions", USUAL_SKIP)),
        np.inf if max_norm is None else float(max_norm),
        _training_mean(path, width),
    )


def _training_mean(path: Path, width: int) -> np.ndarray | None:
    """From `statistics.npz` of the run folder, which is `path` or holds it as `dictionaries/NAME`; or of its site's.

    A sweep keeps `dictionaries/SITE/NAME`, and the statistics of a site beside its dictionaries.
    """
    folders = [path]
    folders += [path.parent.parent] if path.parent.name == "dictionaries" else []
    folders += [path.parent] if path.parent.parent.name == "dictionaries" else []
    found = next((file for folder in folders if (file := folder / "statistics.npz").is_file()), None)
    if found is None:
        return None
    try:
        mean = Statistics.load(found).mean
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{found} cannot be read ({error}); remove it to do without mean ablation") from error
    return mean if mean.shape == (width,) else None
