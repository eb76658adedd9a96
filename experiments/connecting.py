"""Dictionaries before and after a part of the model, found and checked: the part that experiments on connections share.

    opened = open_dictionaries(flags)                        found or trained, of one model and text
    codes  = collect(flags, opened)                          connecting_codes.py: one pass of the model for all layers
    for ends in opened.ends:                                 connecting_layers.py
        sides = codes.sides(ends, flags)                     pairs: sides.fit, sides.validation, sides.held_out

Connectors are fitted on the training text of the dictionaries; a share of its documents is for choices. The held-out
text is another set of documents, and only measured on.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import run_folder
from experiments.connecting_flags import ConnectingFlags
from experiments.data import Data, blocks_at, check_positive, resolve_bos
from experiments.reading import TEXT, check_width, given_of, open_data, read_dictionary
from sparse_jax.activations import Statistics, collect_statistics
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features import Located
from sparse_jax.lm.model import check_site, site_width
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# Folder of dictionaries that a run has trained itself.
TRAINED = "trained"
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


def feature_count(opened: Opened, site: str) -> int:
    """Features of a site, or numbers of a raw one."""
    coder, config = opened.coders[site], opened.data.lm.config
    return site_width(config, check_site(config, site)) if coder is None else coder.dictionary.n_features
