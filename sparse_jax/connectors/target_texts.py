"""What the model says of a target in single texts: the next token's log-probability where the target is removed, and
the earlier tokens without which it does not fire.

    removal = Removal(lm, coder, "mlp_out.3", text, tokenizer.token_strings)
    column_panels(columns, read, changes_of=removal.changes, needs_of=removal.needs)

Hidden units of a connector have needs too (`HiddenCoder`: the dictionary before the module, then the connector); they
are no direction of the model's, so that removing one is not defined here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from sparse_jax.dictionaries import Normalised
from sparse_jax.features.ablation import ablation_effects
from sparse_jax.features.context_ablation import context_needs, need_contexts
from sparse_jax.features.page import Context
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site


@partial(jax.tree_util.register_dataclass, data_fields=["coder", "params"], meta_fields=["connector"])
@dataclass(frozen=True)
class HiddenCoder:
    """Hidden units as features of the input site's activations. A pytree.

    Attributes:
        coder: the dictionary at the input site.
        connector, params: from its codes to hidden units.
    """

    coder: Normalised
    params: Any
    connector: Any

    @property
    def dictionary(self) -> SimpleNamespace:
        """As many numbers as it reads, and as many features as it has."""
        return SimpleNamespace(d_in=self.coder.dictionary.d_in, n_features=self.connector.n_features)

    def encode(self, x: jax.Array) -> jax.Array:
        """`[rows, width]` of raw activations `[rows, d_in]` of the input site."""
        return self.connector.hidden(self.params, self.coder.encode(x))


@dataclass(frozen=True)
class Removal:
    """The model and a dictionary at a site, for `column_panels`.

    Attributes:
        lm, coder, site: the target's; for `needs` of hidden units a `HiddenCoder` and the input site.
        text: the rows.
        token_strings: token ids to what is shown.
        max_norm: places whose activation has a larger norm do not count.
    """

    lm: LanguageModel
    coder: Normalised | HiddenCoder
    site: Site | str
    text: Rows
    token_strings: Callable[[np.ndarray], list[str]]
    max_norm: float = float("inf")

    def changes(self, feature: int, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Row -> `[position]` change of each next token's log p, in nats, on ablating the feature in that row."""
        rows = np.asarray(rows, np.int64)
        tokens, targets, mask, _ = self.text[rows]
        if not (mask & (targets >= 0)).any():
            return {}
        found = ablation_effects(
            self.lm, self.coder, self.site, tokens, targets, mask, [feature], keep_changes=True, max_norm=self.max_norm
        ).changes
        return {int(rows[row]): log_p for row, log_p in zip(found.rows, found.log_p)}

    def needs(self, feature: int, rows: np.ndarray, positions: np.ndarray) -> tuple[Context, ...]:
        """What its activation at each place loses without each earlier token."""
        tokens = self.text[np.asarray(rows, np.int64)][0]
        positions = np.asarray(positions, np.int64)
        start = int(self.text.bos_id is not None)
        found = context_needs(self.lm, self.coder, self.site, feature, tokens, positions, start=start)
        return need_contexts(found, tokens, positions, self.token_strings)
