"""The pages of `experiments.sparse_connections`: which targets get one, and what stands on it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.connecting import Ends, Opened
from experiments.connecting_codes import Sides
from experiments.sparse_connections import Flags
from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.code_panels import ReadText, column_panels
from sparse_jax.connectors.connection import Connection
from sparse_jax.connectors.connection_pages import used_inputs, write_connection_pages
from sparse_jax.connectors.target_texts import Removal


def chosen_targets(made: list[Connection], alive: np.ndarray, count: int) -> list[int]:
    """Targets that get a page: in turns those of each label, the best predicted first; alive ones with inputs."""
    by_label: dict[str, list[int]] = {}
    for each in sorted(made, key=lambda each: (-(each.r2 if each.r2 is not None else -np.inf), each.target)):
        if alive[each.target] and each.formula.nonzeros:
            by_label.setdefault(each.label, []).append(each.target)
    queues, chosen = [by_label[label] for label in sorted(by_label)], []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen)


def write_pages_of(
    flags: Flags, opened: Opened, ends: Ends, sides: Sides, made: list[Connection], table: dict, folder: Path
) -> None:
    """Write the pages of the chosen targets; none where no target has an input."""
    from tqdm import tqdm

    chosen = chosen_targets(made, np.asarray(table["alive"]), flags.pages)
    if not chosen:
        return
    data, held = opened.data, sides.held_out
    inputs, fires = code_columns(held.inputs), code_columns(held.targets)
    read = ReadText(held.tokens, data.evaluation, data.tokenizer.token_strings)
    shown = [made[target] for target in chosen]
    of_inputs = {panel.index: panel for panel in column_panels(inputs, read, used_inputs(shown), seed=flags.seed)}
    removal = removal_of(opened, ends.target)
    own = column_panels(
        fires, read, chosen, seed=flags.seed, changes_of=None if removal is None else removal.changes,
        needs_of=removal.needs if removal is not None and flags.needs else None,
    )  # fmt: skip
    pairs: Iterable = tqdm(zip(own, shown), total=len(shown), desc="pages", unit="target", mininterval=0.5)
    write_connection_pages(
        folder, ends.name, pairs, of_inputs, subtitle=f"{data.flags.model}, sparse linear connector",
        facts=facts(sides, made, table, chosen),
    )  # fmt: skip


def removal_of(opened: Opened, site: str) -> Removal | None:
    """What says of a target what the model does without it; None of a raw site."""
    coder, data = opened.coders[site], opened.data
    if coder is None:
        return None
    limit = opened.max_norms(site).get(site, float("inf"))
    return Removal(data.lm, coder, site, data.evaluation, data.tokenizer.token_strings, limit)


def facts(sides: Sides, made: list[Connection], table: dict, chosen: list[int]) -> list[tuple[str, str]]:
    """What stands above the table."""
    return [
        ("held-out tokens", f"{len(sides.held_out):,}"),
        ("targets", f"{len(made):,}, of which {int(np.sum(table['alive'])):,} alive"),
        ("shown", f"{len(chosen)}: in turns those of each label, the best predicted first"),
    ]
