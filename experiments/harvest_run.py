"""What `experiments.harvest` does with its flags, from top to bottom."""

import dataclasses
import shutil
import time
from pathlib import Path

from experiments import command, run_folder
from experiments.data import check_fits, check_positive, resolve_bos, weights_sha256
from experiments.harvest import Flags
from experiments.replacement import load_replacement, read_provenance
from experiments.stored import DECIDED
from experiments.text import check_text, is_hub, layout, sides, text_fingerprint, training_rows, whole
from sparse_jax.activations import Entry, Manifest, open_store
from sparse_jax.activations.harvest import Progress, check_room, harvest, shard_rows_for
from sparse_jax.activations.store import END, MANIFEST
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, check_site, load, load_tokenizer, resolve, site_width
from sparse_jax.lm.row_stream import RowStream
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.tokenizer import Tokenizer
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    if flags.check:
        return check_store(flags.out)
    started = time.perf_counter()
    if flags.reuse_memory:
        keep_freed_memory()
    check_numbers(flags)
    check_folder(flags)
    flags = resolve_bos(flags)
    if flags.compute_dtype == "auto":
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    tokenizer = load_tokenizer(resolve(flags.model, flags.revision))
    lm = load(flags.model, flags.revision, dtype=flags.compute_dtype)
    check_fits(lm, tokenizer, flags)
    sha256 = weights_sha256(flags.model, flags.revision)
    entries, dictionaries, told = wanted(flags, lm, sha256)
    rows = read(flags, tokenizer)
    limit = None if flags.tokens is None else flags.tokens // flags.context
    n_rows = None if rows.n_rows is None else rows.reach(limit or rows.n_rows)
    manifest = Manifest(
        identity={**identity(flags, tokenizer, sha256), **told},
        entries=entries,
        context=flags.context,
        fill_id=rows.fill_id,
        vocab_size=lm.config.vocab_size,
        shard_rows=1,
        n_rows=n_rows,
        window_rows=rows.window_rows,
    )
    size = flags.shard_rows or shard_rows_for(manifest.bytes_per_row)
    manifest = dataclasses.replace(manifest, shard_rows=size)
    if flags.overwrite:
        clear(flags.out)
    if not flags.resume:
        check_room(flags.out, manifest, n_rows if n_rows is not None else limit)
    print(summary(flags, lm, manifest, n_rows), flush=True)
    done = take(flags, lm, rows, manifest, dictionaries, limit)
    report(flags, manifest, done, time.perf_counter() - started)
    return 0 if done.finished else command.EXIT_INTERRUPTED


def check_numbers(flags: Flags) -> None:
    """Raises InputError for flags that no harvest can use, before anything is loaded."""
    check_text(flags)
    check_positive(flags, "context", "slots", "processes")
    for name in ("tokens", "shard_rows"):
        if getattr(flags, name) is not None:
            check_positive(flags, name)
    if flags.tokens is not None and flags.tokens < flags.context:
        raise InputError(f"--tokens {flags.tokens} is below one row of {flags.context}: give more tokens")
    if not 0 <= flags.process < flags.processes:
        raise InputError(f"--process {flags.process} of --processes {flags.processes}: give 0 to {flags.processes - 1}")
    if flags.overwrite and flags.processes > 1:
        raise InputError("--overwrite with several --processes: each would remove what others write; remove it first")
    if flags.tokens is None and is_hub(flags.eval_text if flags.side == "evaluation" else flags.text):
        print("a dataset of the hub is stored to its end: --tokens sets a limit")


def check_folder(flags: Flags) -> None:
    """Raises InputError unless --out may be written; makes and removes nothing."""
    if flags.resume and flags.overwrite:
        raise InputError("--resume goes on with a store and --overwrite removes it: give one of them")
    there = (flags.out / MANIFEST).exists()
    if there and not (flags.resume or flags.overwrite or flags.processes > 1):
        raise InputError(f"{flags.out} already holds a store: give --resume, --overwrite or another --out")
    if flags.resume and not there:
        raise InputError(f"{flags.out} holds no store that could be resumed: leave --resume out")
    if not there and flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise InputError(f"--out {flags.out} holds something else than a store: give another folder")
    run_folder.check_writable(flags.out)


def clear(out: Path) -> None:
    """Remove a store's own files."""
    for name in (MANIFEST, END):  # the manifest first: without it there is no store
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "shards", ignore_errors=True)


def wanted(
    flags: Flags, lm: LanguageModel, sha256: str
) -> tuple[tuple[Entry, ...], dict[str, Normalised], dict[str, dict]]:
    """What is stored, the dictionaries of stored codes by entry, and what the manifest is told of them.

    Raises:
        InputError: a site that the model lacks, or twice; a dictionary of another model.
    """
    names = flags.sites or (() if flags.codes else ("resid_post.3",))
    checked = [check_site(lm.config, name) for name in names]
    entries = [Entry(site, site_width(lm.config, site), flags.dtype) for site in checked]
    dictionaries, told = {}, {}
    for path in flags.codes:
        provenance = read_provenance(path)
        trained = load_replacement(path, provenance, lm.config, sha256, allow_other=False).trained
        n_features, site = trained.dictionary.n_features, check_site(lm.config, provenance["site"])
        entry = Entry(site, site_width(lm.config, site), "codes", min(flags.slots, n_features), n_features)
        entries.append(entry)
        dictionaries[entry.name] = trained
        told[entry.name] = {"dictionary": str(path), "kind": trained.dictionary.kind, "provenance": provenance}
    found = [entry.name for entry in entries]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise InputError(f"{', '.join(twice)} given twice: a store holds each once")
    return tuple(entries), dictionaries, {"codes": told} if told else {}


def read(flags: Flags, tokenizer: Tokenizer) -> Rows | RowStream:
    """The rows of the side that is wanted."""
    to_train, held_out = sides(flags, tokenizer)
    if flags.side == "train":
        return training_rows(flags, to_train, tokenizer)
    return whole(held_out, tokenizer, layout(flags), flags.tokens)


def identity(flags: Flags, tokenizer: Tokenizer, sha256: str) -> dict:
    """What decides the contents of the store: the flags of model and text, and digests of what they name."""
    plain = run_folder.jsonable(flags)
    joined = {"joined": "joined documents", "documents": "documents apart"}[layout(flags).packing]
    rule = "each row begins with the begin-of-text token" if flags.bos == "row" else "no begin-of-text token"
    return {
        **{name: plain[name] for name in DECIDED},
        "weights_sha256": sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "text_fingerprint": text_fingerprint(flags),
        "side": flags.side,
        "tokens": flags.tokens,
        "compute_dtype": flags.compute_dtype,
        "rows": f"{joined}, {rule}, a separator (id {tokenizer.separator_id}) before each",
    }


def summary(flags: Flags, lm: LanguageModel, manifest: Manifest, n_rows: int | None) -> str:
    """What is about to be stored."""
    what = ", ".join(
        f"{entry.name} ({entry.dtype}, {entry.bytes_per_token:,} bytes a token)" for entry in manifest.entries
    )
    size = "until the text ends"
    if n_rows is not None:
        size = f"{n_rows * manifest.context:,} tokens, {n_rows * manifest.bytes_per_row / 1e9:.2f} GB"
    return (
        f"model {flags.model}: {lm.config.n_layers} layers, d_model {lm.config.d_model}; {what}\n"
        f"text {flags.text}, {flags.side} documents, {manifest.identity['rows']}: {size}, in shards of "
        f"{manifest.shard_rows:,} rows of {manifest.context}"
    )


def take(
    flags: Flags,
    lm: LanguageModel,
    rows: Rows | RowStream,
    manifest: Manifest,
    dictionaries: dict[str, Normalised],
    limit: int | None,
) -> Progress:
    """`harvest` with a bar; Ctrl-C ends it after the batch at hand."""
    from tqdm import tqdm

    known = manifest.n_rows if manifest.n_rows is not None else limit
    total = None if known is None else known * manifest.context // flags.processes
    with (
        command.StopRequest() as stop,
        tqdm(total=total, desc="harvesting", unit="tok", unit_scale=True, mininterval=0.5) as bar,
    ):
        return harvest(
            lm,
            rows,
            flags.out,
            manifest,
            dictionaries=dictionaries,
            limit=limit,
            process=flags.process,
            processes=flags.processes,
            progress=lambda count: bar.update(count * manifest.context),
            warn=lambda text: bar.write(f"warning: {text}"),
            should_stop=stop,
        )


def report(flags: Flags, manifest: Manifest, done: Progress, seconds: float) -> None:
    """Say what was done."""
    before = f", {done.found} were there before" if done.found else ""
    print(f"{done.written} shards written{before}; {seconds:.0f} s")
    if done.lost:
        print(f"{done.lost:,} active features found no slot: give more than --slots {flags.slots} to keep them")
    if not done.finished:
        print("not finished; go on with --resume")
    elif flags.processes == 1:
        store = open_store(flags.out)
        print(f"store: {flags.out}, {len(store):,} rows, {store.n_tokens:,} tokens of {len(store.documents)} documents")


def check_store(out: Path) -> int:
    """Read all of a store; returns 1 if any of it is damaged or missing."""
    store = open_store(out, unfinished=True)
    damaged = store.damage()
    for text in damaged:
        print(text)
    print(f"{out}: {store.n_shards} shards read, {len(damaged)} damaged; {len(store):,} rows")
    return int(bool(damaged))
