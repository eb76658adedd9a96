"""Dictionaries before and after a part of the model, with their codes: the part that experiments on connections share.

    opened = open_dictionaries(flags)                        found or trained, of one model and text
    codes  = collect(flags, opened)                          one pass of the model for all layers
    for ends in opened.ends:
        sides = codes.sides(ends, flags)                     pairs: sides.fit, sides.validation, sides.held_out

Connectors are fitted on the training text of the dictionaries; a share of its documents is for choices. The held-out
text is another set of documents, and only measured on.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import run_folder
from experiments.connecting_flags import ConnectingFlags
from experiments.data import Data, blocks_at, check_positive, resolve_bos
from experiments.reading import BLOCK_ROWS, TEXT, check_width, given_of, open_data, read_dictionary
from sparse_jax.activations import Statistics, collect_statistics
from sparse_jax.connectors.collect_codes import collect_codes
from sparse_jax.connectors.paired_codes import CodeStore, Pair
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features import Located
from sparse_jax.lm.model import check_site, site_width
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# Folders of an experiment on connections beside those of every run.
LAYERS, TRAINED, CODES = "layers", "trained", "codes"
FIGURES = "figures.json"
# What a card says of the model and of the text; the dictionaries must agree in it.
_MODEL = ("weights_sha256", "tokenizer_sha256")
_TEXT = ("text_fingerprint", "text_field", "eval_text", "holdout", "context", "stride", "packing", "bos",
         "skip_positions")  # fmt: skip
# Training tokens from which the mean of a site without statistics is.
_MEAN_TOKENS = 65_536


@dataclass(frozen=True)
class Ends:
    """One connection.

    Attributes:
        inputs, target: names of sites.
    """

    inputs: tuple[str, ...]
    target: str

    @property
    def layer(self) -> int:
        """The target's."""
        return Site.parse(self.target).layer

    @property
    def name(self) -> str:
        return f"{' + '.join(self.inputs)} to {self.target}"


@dataclass(frozen=True)
class Opened:
    """What is connected.

    Attributes:
        data: model (float32), tokenizer, rows of text.
        coders: site -> dictionary; None: the raw site.
        paths: site -> where it was read; not of raw sites.
        provenance: site -> what its card says.
        ends: the connections, by layer.
    """

    data: Data
    coders: dict[str, Normalised | None]
    paths: dict[str, Path]
    provenance: dict[str, dict]
    ends: tuple[Ends, ...]

    def located(self, site: str) -> Located:
        """A site with its dictionary."""
        return Located(site, self.coders[site])

    def max_norms(self, *sites: str) -> dict[str, float]:
        """Site -> the largest norm that counted in its dictionary's training, where there was a limit."""
        said = {site: self.provenance.get(site, {}).get("max_norm") for site in sites or self.coders}
        return {site: norm for site, norm in said.items() if norm is not None}

    def mean(self, site: str) -> np.ndarray:
        """`[width]` mean activation over training tokens."""
        return self.statistics(site).mean

    def statistics(self, site: str) -> Statistics:
        """Of training activations at a site: what its dictionary's run kept, or of some training tokens."""
        path = self.paths.get(site)
        if path is not None and self.provenance[site].get("site") == site:
            for folder in (path, path.parent):
                # Those of a run (or of a site in a sweep) belong to the dictionary below; the card says of which text.
                if (folder / "statistics.npz").is_file():
                    return Statistics.load(folder / "statistics.npz")
        here = dataclasses.replace(self.data, site=check_site(self.data.lm.config, site))
        blocks = blocks_at(here, 0, self.max_norms(site).get(site, math.inf))
        return collect_statistics(blocks, max(1, _MEAN_TOKENS // blocks.tokens_per_block))

    def resolved(self) -> dict:
        """What is connected, for config.json."""
        kinds = {site: "raw" if coder is None else coder.dictionary.kind for site, coder in self.coders.items()}
        return {
            **self.data.identity(),
            "connections": [ends.name for ends in self.ends],
            "dictionaries": {site: {"kind": kind, "path": str(self.paths.get(site))} for site, kind in kinds.items()},
        }


def check(flags: ConnectingFlags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check_positive(flags, "tokens", "eval_tokens", "dictionary_tokens", "dictionary_k", "dictionary_expansion")
    if not 0 < flags.validation < 1:
        raise InputError(f"--validation {flags.validation}: give a share between 0 and 1")
    if flags.seed < 0:
        raise InputError(f"--seed {flags.seed}: give 0 or more")
    if flags.before or flags.after is not None:
        if not flags.before or flags.after is None:
            raise InputError("--before and --after give the dictionaries of one connection: give both")
        if flags.run is not None or flags.layers or flags.all_layers or flags.train_missing or flags.raw:
            raise InputError(
                "--before and --after say which dictionaries are connected: give no run folder, --layers, "
                "--all-layers, --raw or --train-missing beside them"
            )
    else:
        if flags.run is None and not flags.train_missing:
            raise InputError("no dictionaries: give a run folder of experiments.sweep, --before and --after, or "
                             "--train-missing")  # fmt: skip
        if bool(flags.layers) == flags.all_layers:
            raise InputError("which layers? give --layers or --all-layers (one of them)")
        if flags.run is not None and not (flags.run / "dictionaries").is_dir():
            raise InputError(f"{flags.run} holds no dictionaries/: give the run folder of experiments.sweep")
    if not flags.inputs or len(set(flags.inputs)) < len(flags.inputs) or flags.target in flags.inputs:
        given = f"--inputs {' '.join(flags.inputs)} --target {flags.target}"
        raise InputError(f"{given}: give different sites, at least one")
    if unknown := [name for name in flags.raw if name not in (*flags.inputs, flags.target)]:
        raise InputError(f"--raw {' '.join(unknown)}: give sites of --inputs or --target")
    if flags.raw and set(flags.raw) >= {*flags.inputs, flags.target}:
        raise InputError("--raw of every site: give at least one with a dictionary")
    run_folder.check_apart(flags.out, flags.run, flags.after, flags.step0_run, *flags.before)


def open_dictionaries(flags: ConnectingFlags) -> Opened:
    """The dictionaries of all connections, with their model and text. Trains those that are missing, if so told.

    Raises:
        InputError: flags that cannot be used; a dictionary is missing, or is of another model, text or site.
    """
    ends, paths = _given(flags) if flags.after is not None else _found(flags)
    raw = [site for each in ends for site in (*each.inputs, each.target) if Site.parse(site).name in flags.raw]
    read = {site: read_dictionary(path) for site, path in paths.items()}
    provenance = {site: card for site, (_, card) in read.items()}
    check_cards(provenance, paths)
    first = next(iter(paths))
    given = given_of(flags, "model", "revision", "text", "eval_text") | {"site": first}
    data = open_data(paths[first], provenance[first], given, eval_tokens=flags.eval_tokens, tokens=flags.tokens)
    if not isinstance(data.train, Rows):
        raise InputError("the training text is read in windows; connectors need a text that is read whole")
    check_weights(data, provenance, paths)
    coders: dict[str, Normalised | None] = {site: coder for site, (coder, _) in read.items()}
    for site, coder in read.items():
        here = dataclasses.replace(data, site=check_site(data.lm.config, site))
        check_width(coder[0], here, paths[site])
    for site in raw:
        site_width(data.lm.config, check_site(data.lm.config, site))
        coders[site] = None
    return Opened(data, coders, paths, provenance, tuple(ends))


def _given(flags) -> tuple[list[Ends], dict[str, Path]]:
    """One connection between dictionaries in folders; each must say its site."""
    sites = []
    for path in (*flags.before, flags.after):
        site = read_dictionary(path)[1].get("site")
        if site is None:
            raise InputError(f"the dictionary in {path} does not say which site it was trained on: give one that does")
        sites.append(str(Site.parse(site)))
    if len(set(sites)) < len(sites):
        raise InputError(f"dictionaries of {', '.join(sites)}: give those of different sites")
    return [Ends(tuple(sites[:-1]), sites[-1])], dict(zip(sites, (*flags.before, flags.after)))


def _found(flags) -> tuple[list[Ends], dict[str, Path]]:
    """The connections of the layers in a sweep's run folder."""
    layers = flags.layers or _layers(flags)
    ends = [
        Ends(tuple(f"{name}.{layer}" for name in flags.inputs), f"{flags.target}.{layer}")
        for layer in sorted(set(layers))
    ]
    wanted = list(dict.fromkeys(site for each in ends for site in (*each.inputs, each.target)))
    wanted = [site for site in wanted if Site.parse(site).name not in flags.raw]
    paths = {site: find_member(flags.run, site, flags.member) for site in wanted}
    missing = [site for site, path in paths.items() if path is None]
    if missing and not flags.train_missing:
        raise InputError(
            f"no dictionaries of {', '.join(missing)} in {flags.run}: give another run folder, other --layers, or "
            "--train-missing"
        )
    if missing:
        like = next((read_dictionary(path) for path in paths.values() if path is not None), (None, {}))[1]
        made = train_missing(flags, missing, like)
        paths |= {site: find_member(made, site, None) for site in missing}
    return ends, paths


def find_member(run: Path | None, site: str, member: str | None) -> Path | None:
    """The folder of a site's dictionary in a sweep's run folder; None: there is none.

    Raises:
        InputError: it has several and none, or one that is not there, was asked for.
    """
    if run is None:
        return None
    layer = Site.parse(site).layer
    # The stream that leaves a layer is the one that enters the next.
    names = [site] + ([f"resid_post.{layer - 1}"] if site == f"resid_pre.{layer}" and layer else [])
    for name in names:
        members = sorted(path.parent for path in (run / "dictionaries" / name).glob("*/dictionary.json"))
        if not members:
            continue
        chosen = [path for path in members if member in (None, path.name)]
        if len(chosen) != 1:
            raise InputError(
                f"{run / 'dictionaries' / name} has {', '.join(path.name for path in members)}: give one of them as "
                "--member"
            )
        return chosen[0]
    return None


def _layers(flags) -> tuple[int, ...]:
    """Those with all dictionaries, or of the model."""
    if flags.train_missing:
        from sparse_jax.lm.load import load

        model = flags.model or _card_of_any(flags).get("model") or "novel-neox"
        return tuple(range(load(model, flags.revision).config.n_layers))
    names = [name for name in (*flags.inputs, flags.target) if name not in flags.raw]
    there = {path.parent.parent.name for path in (flags.run / "dictionaries").glob("*/*/dictionary.json")}
    numbers = sorted({Site.parse(site).layer for site in there} | {Site.parse(site).layer + 1 for site in there})

    def has(name, layer):
        return find_member(flags.run, f"{name}.{layer}", flags.member) is not None

    found = tuple(layer for layer in numbers if all(has(name, layer) for name in names))
    if not found:
        raise InputError(f"{flags.run} has no layer with dictionaries of {', '.join(names)}; it has {sorted(there)}")
    return found


def _card_of_any(flags) -> dict:
    paths = [] if flags.run is None else sorted((flags.run / "dictionaries").glob("*/*/dictionary.json"))
    return read_dictionary(paths[0].parent)[1] if paths else {}


def train_missing(flags: ConnectingFlags, sites: list[str], like: dict) -> Path:
    """Train dictionaries as `experiments.sweep` does, in OUT/trained, or find them there; returns that run folder.

    Args:
        flags: the experiment's.
        sites: of which there are none.
        like: card of a dictionary that is there, whose model and text are taken; or nothing.
    """
    from experiments import sweep
    from sparse_jax.dictionaries import TopK
    from sparse_jax.numerics.precision import fast_dtype

    out = flags.out / TRAINED
    text = {name: like[name] for name in TEXT if like.get(name) is not None}
    text |= {k: v for k, v in given_of(flags, "model", "revision", "text", "eval_text").items() if v is not None}
    dictionary = TopK(k=flags.dictionary_k, expansion=flags.dictionary_expansion)
    wanted = sweep.Flags(
        dictionary, **text, sites=tuple(sites), tokens=flags.dictionary_tokens, eval_tokens=flags.eval_tokens,
        seeds=(flags.seed,), seed=flags.seed, measure_at=(1.0,), compute_dtype=fast_dtype(), out=out,
    )  # fmt: skip
    wanted = resolve_bos(wanted)
    if (out / "config.json").is_file():
        try:
            run_folder.check_same(run_folder.read_config(out)["flags"], run_folder.jsonable(wanted), out)
        except InputError:
            if not flags.overwrite:
                raise
            wanted = dataclasses.replace(wanted, overwrite=True)
        else:
            if (out / "metrics.json").is_file():
                return out
            wanted = dataclasses.replace(wanted, resume=True)
    print(f"training dictionaries of {', '.join(sites)} in {out}", flush=True)
    if sweep.main(wanted):
        raise KeyboardInterrupt
    return out


def check_cards(provenance: dict[str, dict], paths: dict[str, Path]) -> None:
    """Raises InputError where the cards of two dictionaries name other models or texts; what they do not say agrees."""
    first = next(iter(provenance))
    for site, card in provenance.items():
        for names, what in ((_MODEL, "model"), (_TEXT, "text")):
            said = {n: (provenance[first].get(n), card.get(n)) for n in names}
            wrong = [f"{n}: {a!r} there, {b!r} here" for n, (a, b) in said.items() if None not in (a, b) and a != b]
            if wrong:
                raise InputError(
                    f"the dictionaries in {paths[first]} and {paths[site]} are of another {what} each "
                    f"({'; '.join(wrong)}): give dictionaries of one model and one text"
                )
        due = {site} | ({f"resid_post.{Site.parse(site).layer - 1}"} if Site.parse(site).name == "resid_pre" else set())
        if card.get("site") is not None and str(Site.parse(card["site"])) not in due:
            raise InputError(f"the dictionary in {paths[site]} is of {card['site']}: give that of {site}")


def check_weights(data: Data, provenance: dict[str, dict], paths: dict[str, Path]) -> None:
    """Raises InputError where the model is not the dictionaries' own."""
    here = data.identity()["weights_sha256"]
    for site, card in provenance.items():
        if card.get("weights_sha256") not in (None, here):
            raise InputError(
                f"the dictionary in {paths[site]} was trained on {card.get('model')!r} with weights "
                f"{card['weights_sha256'][:12]}..., {data.flags.model} has {here[:12]}...: give its own --model"
            )


@dataclass(frozen=True)
class Sides:
    """The pairs of a connection.

    Attributes:
        fit: training text, what connectors are fitted on.
        validation: other documents of it, on which choices are made.
        held_out: held-out text, what figures are of.
    """

    fit: Pair
    validation: Pair
    held_out: Pair


@dataclass(frozen=True)
class Codes:
    """Codes of all sites.

    Attributes:
        train, held_out: of either text.
        numbers: rows of `data.evaluation` that are read.
    """

    train: CodeStore
    held_out: CodeStore
    numbers: np.ndarray

    def sides(self, ends: Ends, flags: ConnectingFlags) -> Sides:
        """The pairs of one connection."""
        fit, validation = self.train.pair(ends.inputs, ends.target).split(flags.validation, flags.seed)
        return Sides(fit, validation, self.held_out.pair(ends.inputs, ends.target))


def collect(flags: ConnectingFlags, opened: Opened) -> Codes:
    """Codes of all sites on both texts, in files; those of the same model, text and dictionaries are used again.

    Raises:
        InputError: --codes holds others; a text of too few documents.
    """
    from tqdm import tqdm

    data, folder = opened.data, flags.codes or flags.out / CODES
    count = min(len(data.train), max(1, -(-flags.tokens // data.train.context)))
    rows = {
        "train": (data.train, np.sort(row_indices(len(data.train), flags.seed, 0, count))),
        "held_out": (data.evaluation, np.sort(held_out_rows(flags, data))),
    }
    stores = {}
    for name, (text, numbers) in rows.items():
        _check_documents(text, numbers, name)
        with tqdm(total=numbers.size * text.context, desc=f"codes, {name.replace('_', '-')} text", unit="token",
                  unit_scale=True, mininterval=0.5) as bar:  # fmt: skip
            arguments = (data.lm, text, numbers, opened.coders)
            kept = {"max_norms": opened.max_norms(), "folder": folder / name, "progress": bar.update}
            stores[name] = _collected(arguments, kept, flags)
    return Codes(stores["train"], stores["held_out"], rows["held_out"][1])


def held_out_rows(flags: ConnectingFlags, data: Data) -> np.ndarray:
    """Rows of the held-out text that are read."""
    count = min(len(data.evaluation), max(1, flags.eval_tokens // data.evaluation.context))
    return row_indices(len(data.evaluation), 0, 0, count)


def spread_rows(numbers: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows, at least one, evenly from first to last: of all documents that those have."""
    count = min(len(numbers), max(1, count))
    return numbers[np.arange(count) * len(numbers) // count]


def _collected(arguments, kept, flags) -> CodeStore:
    folder: Path = kept["folder"]
    places = [folder, folder.with_name(f"{folder.name}.unfinished")]
    before = any(place.exists() for place in places)
    try:
        return collect_codes(*arguments, **kept)
    except InputError:
        # Codes of another run in our own folder are in the way; in a folder that was given they are someone else's.
        if not before or flags.codes is not None or flags.resume:
            raise
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        return collect_codes(*arguments, **kept)


def _check_documents(text: Rows, numbers: np.ndarray, name: str) -> None:
    _, _, mask, document = text[spread_rows(numbers, 4 * BLOCK_ROWS)]
    if len(np.unique(document[mask])) < 2:
        flag = "--tokens" if name == "train" else "--eval-tokens"
        raise InputError(f"the {name.replace('_', '-')} text has fewer than two documents: raise {flag}")


@dataclass
class Stages:
    """Seconds of each stage of a layer's work, told as they go."""

    label: str
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
        print(f"{self.label}: {name}, {self.seconds[name]:.1f} s", flush=True)


def feature_count(opened: Opened, site: str) -> int:
    """Features of a site, or numbers of a raw one."""
    coder, config = opened.coders[site], opened.data.lm.config
    return site_width(config, check_site(config, site)) if coder is None else coder.dictionary.n_features


def layer_folder(out: Path, ends: Ends) -> Path:
    """Where a layer's tables, connectors and pages are."""
    return out / LAYERS / str(ends.layer)


def done_before(flags: ConnectingFlags, ends: Ends) -> dict | None:
    """A layer's figures where --resume finds it done; else its folder is emptied."""
    folder = layer_folder(flags.out, ends)
    if flags.resume and (folder / FIGURES).is_file():
        return json.loads((folder / FIGURES).read_text(encoding="utf8"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def begin(flags: ConnectingFlags, opened: Opened, earlier: dict | None) -> None:
    """The run folder with its config.json; a resumed run keeps what it has."""
    if earlier is None:
        run_folder.begin(flags, opened.resolved(), also=(LAYERS,))


def prepared(flags: ConnectingFlags) -> dict | None:
    """Check the run folder; an earlier run's config where it is resumed, whose flags must be the same."""
    earlier = run_folder.prepare(flags.out, overwrite=flags.overwrite, resume=flags.resume)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    return earlier


def read_control(flags: ConnectingFlags, experiment: str) -> dict | None:
    """`metrics.json` of --step0-run; None where none was given.

    Raises:
        InputError: it is no finished run of this experiment.
    """
    if flags.step0_run is None:
        return None
    path = flags.step0_run / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError):
        raise InputError(f"--step0-run {flags.step0_run}: no finished run is there (metrics.json)") from None
    if found.get("experiment") != experiment:
        raise InputError(f"--step0-run {flags.step0_run} is a run of {found.get('experiment')!r}, not of {experiment}")
    return found


def check_control(control: dict | None, opened: Opened) -> None:
    """Raises InputError where the control is of the same model, or of none of the same sites."""
    if control is None:
        return
    if control.get("weights_sha256") == opened.data.identity()["weights_sha256"]:
        raise InputError("--step0-run is of the same weights: give a run on the model with random ones")
    if not set(control["layers"]) & {str(ends.layer) for ends in opened.ends}:
        raise InputError(f"--step0-run has layers {', '.join(control['layers'])}: give a run on the same ones")


def plain(value: Any) -> Any:
    """JSON values: of named tuples and dataclasses dicts, of arrays lists, None for what is no finite number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rows_of(columns: dict[str, Any]) -> list[dict]:
    """One JSON row a target of columns of equal length."""
    listed = {name: plain(np.asarray(values)) for name, values in columns.items()}
    return [dict(zip(listed, row)) for row in zip(*listed.values(), strict=True)]
