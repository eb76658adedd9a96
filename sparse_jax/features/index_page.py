"""A folder of pages: an index of all features, and a panel of each with everything that is known of it.

    write_pages("runs/demo/features", "pythia-70m, resid_post.3", panels)

`index.html` opens from the disk or from any server. It holds the style and the program, both named by their hash in a
content security policy that forbids every request but for the data beside it: `index-data.js`, the columns of the
index, and `shard-000.js`, `shard-001.js`, ..., the panels of some features each, fetched by script tags when a feature
of theirs is opened (a page from the disk may read nothing in another way). All text is put in as text; where the
browser knows trusted types, the policy forbids any other way.
"""

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path

from sparse_jax.errors import InputError
from sparse_jax.features.panel_data import Columns, Strings, pack, script
from sparse_jax.features.panels import FeaturePanel, index_row
from sparse_jax.features.svg import escape

_SCRIPTS = ("text.js", "panel.js", "sections.js", "data.js", "columns.js", "table.js", "route.js")
_OURS = re.compile(r"index\.html|index-data\.js|shard-\d+\.js")
_MARK = '<meta name="generator" content="sparse_jax features">'


def write_pages(
    folder: str | os.PathLike,
    title: str,
    panels: Iterable[FeaturePanel],
    *,
    subtitle: str = "",
    facts: Iterable[tuple[str, str]] = (),
    effect_name: str = "CE rise",
    effect_hint: str = "increase of cross-entropy where the feature is ablated, nats",
    score_hints: Iterable[tuple[str, str]] = (),
    noun: tuple[str, str] = ("Feature", "features"),
    per_shard: int = 64,
) -> Path:
    """Write the index and the panels; returns the path of the index.

    The panels are taken one by one, in the order in which they come, and `per_shard` of them are in memory at a time,
    beside some hundred bytes of each for the index. The folder is whole or absent: pages are written beside it and put
    in its place when the last is done; where anything fails, what was there stays.

    Args:
        folder: where to; its parent must exist. Pages that are there are replaced, any other content is refused.
        title: of the page.
        panels: the features, each at most once.
        subtitle: one line: model, site, dictionary.
        facts: names and values, shown above the table: ("tokens", "2,000,000").
        effect_name, effect_hint: what `FeaturePanel.effect` is, as the head of its column and in a sentence.
        score_hints: what scores mean, by name: shown where the pointer rests on the head of the column.
        noun: what one is called, as a head, and several.
        per_shard: panels in a file; the page keeps a few files in memory.

    Raises:
        InputError: the folder holds something else, or its parent is missing; a feature comes twice; `per_shard` is
            not positive.
    """
    folder = Path(folder)
    if per_shard < 1:
        raise InputError(f"per_shard is {per_shard}; it must be 1 or more")
    _check_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        columns = Columns()
        for count, some in enumerate(_batches(_distinct(panels), per_shard)):
            _write(partial / f"shard-{count:03d}.js", _shard(count, some))
            for panel in some:
                columns.add(index_row(panel))
        index = columns.packed(per_shard)
        index |= {"effectName": effect_name, "effectHint": effect_hint, "scoreHints": [list(p) for p in score_hints]}
        index |= {"noun": list(noun)}
        _write(partial / "index-data.js", script("sparseJaxIndex", index))
        _write(partial / "index.html", _page(title, subtitle, facts))
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "index.html"


def _check_replaceable(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise InputError(f"{folder.parent} is no folder: make it, or write the pages elsewhere")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the name of a folder")
    others = sorted(entry.name for entry in folder.iterdir() if not _OURS.fullmatch(entry.name))
    if others:
        raise InputError(f"{folder} holds more than pages of features ({others[0]}): remove it or give another folder")
    index = folder / "index.html"
    if index.exists() and _MARK not in index.read_text("utf-8", errors="replace")[:4096]:
        raise InputError(f"{index} is another page: remove it or give another folder")


def _distinct(panels: Iterable[FeaturePanel]) -> Iterator[FeaturePanel]:
    seen = set()
    for panel in panels:
        if panel.index in seen:
            raise InputError(f"feature {panel.index} comes twice: each has one panel")
        seen.add(panel.index)
        yield panel


def _batches(panels: Iterator[FeaturePanel], size: int) -> Iterator[list[FeaturePanel]]:
    while some := list(islice(panels, size)):
        yield some


def _shard(count: int, panels: list[FeaturePanel]) -> str:
    strings = Strings()
    packed = [pack(panel, strings) for panel in panels]
    return script("sparseJaxShard", count, strings.table(), packed)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _put_in_place(partial: Path, folder: Path) -> None:
    """The new folder takes the old one's place; where that fails the old one is put back."""
    old = partial.with_suffix(".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _asset(name: str) -> str:
    return (files("sparse_jax.features") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _page(title: str, subtitle: str, facts: Iterable[tuple[str, str]]) -> str:
    style = _asset("features.css")
    program = "\n".join(["(() => {", '"use strict";', *map(_asset, _SCRIPTS), "})();"])
    # Chromium takes a page's own folder for 'self'; to other browsers a page from the disk has no self.
    policy = (
        f"default-src 'none'; script-src 'self' file: {_hash(program)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types sparse-jax-data"
    )
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    parts = {
        "mark": _MARK,
        "policy": policy,
        "style": style,
        "program": program,
        "title": escape(title),
        "subtitle": f'<p class="sub">{escape(subtitle)}</p>' if subtitle else "",
        "facts": f'<dl class="facts">{shown}</dl>' if shown else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("features.html"))
