"""Runs that are killed outright at random instants and resumed, beside one that nothing interrupts, bit by bit.

    python -m benchmarks.kill_stress --kills 20

Small runs of `train_sae` and of `sweep`, of streamed text and of a store, on a random model of 16 dimensions that is
made on the fly. A checkpoint is due every other step, so that many of the kills (SIGKILL) fall into a save. Each run is
started again with --resume until it ends, then its dictionaries, bit by bit, and its log are compared with those of the
uninterrupted run. Exit code 1 if any differs or cannot be resumed. On two idle cores a kill takes about 10 seconds.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments import command
from sparse_jax.errors import InputError

ROOT = Path(__file__).parents[1]
# The longest that a run may take; it is ended, and counts as lost.
TIMEOUT = 900.0
CONFIG = {
    "model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 4096, "max_position_embeddings": 64, "rotary_pct": 0.25,
}  # fmt: skip
COMMON = [
    "--tokens", "5120", "--batch", "128", "--block-rows", "16", "--eval-tokens", "512", "--statistics-tokens", "2048",
    "--log-every", "3", "--checkpoint-every", "2", "--compute-dtype", "float32", "--resample-at", "0.5",
]  # fmt: skip
TEXT = ["--context", "32", "--holdout", "0.2"]
# What is trained: the program, its own flags, and the dictionary's.
TRAINED = {
    "single": ("train_sae", ["--site", "resid_post.0", "--report-features", "0", "--target-l0", "6"],
               ["l1", "--expansion", "2", "--l1", "0.5"]),
    "ensemble": ("sweep", ["--sites", "resid_post.0", "resid_post.1", "--seeds", "0", "1", "--sparsities", "4",
                           "--learning-rates", "0.001", "--measure-at", "1.0"],
                 ["topk", "--expansion", "2"]),
}  # fmt: skip


@dataclass(frozen=True)
class Flags:
    """Kill small runs at random instants, resume them, and compare them with uninterrupted ones, bit by bit."""

    kills: int = 20
    """Kills in all, shared among the four cases (a text and a store, a single dictionary and an ensemble)."""
    data: tuple[str, ...] = ("text", "store")
    """What the runs read."""
    trained: tuple[str, ...] = ("single", "ensemble")
    """What they train: one dictionary, or four at two sites."""
    seed: int | None = None
    """Decides the instants, as far as a clock can; by default another each time."""
    folder: Path | None = None
    """Where the runs are kept; by default a temporary folder that is removed."""
    out: Path | None = None
    """A JSON file for the figures."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


@dataclass
class Tally:
    """What became of one case.

    Attributes:
        runs: that were brought to their end.
        kills: processes that were killed.
        in_a_save: kills that left a checkpoint's temporary folder.
        before_any: kills that left no checkpoint.
        resumed_at: steps at which runs went on.
        lost: what was not as in the uninterrupted run, in words.
    """

    runs: int = 0
    kills: int = 0
    in_a_save: int = 0
    before_any: int = 0
    resumed_at: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def main(flags: Flags) -> int:
    """Run the stress test, print a table; returns the exit code."""
    cases = [(data, trained) for data in flags.data for trained in flags.trained]
    if flags.kills < 1 or not cases or not set(flags.data) <= {"text", "store"} or not set(flags.trained) <= {*TRAINED}:
        raise InputError("give --kills of 1 or more, --data text store, --trained single ensemble (or one of them)")
    rng = random.Random(flags.seed)
    shares = [flags.kills // len(cases) + (i < flags.kills % len(cases)) for i in range(len(cases))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if flags.folder is None else flags.folder
        read = made(folder)
        tallies = {}
        for (data, trained), kills in zip(cases, shares):
            if kills:
                arguments = command_of(trained, read[data])
                tallies[f"{data}, {trained}"] = stress(folder / f"{data}-{trained}", arguments, kills, rng)
    print_table(tallies)
    if flags.out:
        flags.out.write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1) + "\n")
    return int(any(tally.lost for tally in tallies.values()))


def made(folder: Path) -> dict[str, list[str]]:
    """A random model, a text and a store of it; returns the flags with which a run reads the text, and the store."""
    model, text, store = small_model(folder / "model"), small_text(folder / "words.txt"), folder / "store"
    streamed = ["--model", str(model), "--text", str(text), *TEXT]
    harvest = ["harvest", *streamed, "--sites", "resid_post.0", "resid_post.1", "--compute-dtype", "float32"]
    finish([*harvest, "--shard-rows", "64", "--out", str(store)])
    return {"text": streamed, "store": ["--store", str(store)]}


def command_of(trained: str, read: Sequence[str]) -> list[str]:
    """The arguments of a run, without --out and --resume; what comes after "--" is the dictionary."""
    program, own, dictionary = TRAINED[trained]
    return [program, *read, *COMMON, *own, "--", *dictionary]


def stress(folder: Path, arguments: list[str], kills: int, rng: random.Random) -> Tally:
    """Kill and resume runs until so many kills are made and the last run has ended."""
    started = time.monotonic()
    finish(with_flags(arguments, folder / "whole"))
    seconds, tally = time.monotonic() - started, Tally()
    print(f"{folder.name}: {seconds:.1f} s uninterrupted", flush=True)
    while tally.kills < kills:
        out = folder / f"killed-{tally.runs}"
        while tally.kills < kills and not (out / "metrics.json").exists():
            started, process = time.monotonic(), start(with_flags(arguments, out))
            ended = wait(process, out, rng, seconds)
            output = stop(process)
            if ended:  # the first run of all compiled its programs
                seconds = min(seconds, time.monotonic() - started)
            if not ended:
                tally.kills += 1
                kind = look(out, tally)
                print(f"  kill {tally.kills}: {kind}", flush=True)
            elif process.returncode:
                tally.lost.append(f"{out.name}: {output.strip().splitlines()[-1:]}")
                break
            tally.resumed_at += resumed_at(output)
        else:
            if not (out / "metrics.json").exists():
                tally.resumed_at += resumed_at(finish(with_flags(arguments, out), tally.lost))
        tally.lost += differences(folder / "whole", out)
        tally.runs += 1
    return tally


def with_flags(arguments: list[str], out: Path) -> list[str]:
    """The arguments with the run folder, and --resume where there is something to resume."""
    at = arguments.index("--")
    resume = ["--resume"] if (out / "config.json").exists() else []
    return [*arguments[:at], "--out", str(out), *resume, *arguments[at + 1 :]]


def wait(process: subprocess.Popen, out: Path, rng: random.Random, seconds: float) -> bool:
    """Wait for a random instant: of the whole run, or (two times of three) of its training.

    Args:
        process, out: the run and its folder.
        rng: decides.
        seconds: that a whole run takes.

    Returns:
        whether the run had ended by itself.
    """
    if rng.random() < 1 / 3:
        return ended_within(process, rng.uniform(0, seconds))
    log, deadline = out / "metrics.jsonl", time.monotonic() + TIMEOUT
    before = log.stat().st_size if log.exists() else 0
    # The log is cut to the checkpoint's step first, then written to.
    while time.monotonic() < deadline:
        if ended_within(process, 0.01):
            return True
        if log.exists() and log.stat().st_size != before:
            break
    return ended_within(process, rng.uniform(0, 0.2 * seconds))


def ended_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def start(arguments: list[str]) -> subprocess.Popen:
    """One of the experiments as a process of its own, its output going to a file."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "sparse_jax" / "jax"), **os.environ}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONWARNINGS": "ignore",
    }
    program, *rest = arguments
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  read and closed by `stop`
    process = subprocess.Popen(
        [sys.executable, "-m", f"experiments.{program}", *rest],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.output = output
    return process


def stop(process: subprocess.Popen) -> str:
    """Kill a process (SIGKILL) if it still runs; returns what it printed."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with process.output as output:
        output.seek(0)
        return output.read()


def finish(arguments: list[str], lost: list[str] | None = None) -> str:
    """Let a run end; returns what it printed.

    Raises:
        InputError: it failed, and there is no list that this could go to.
    """
    process = start(arguments)
    ended = ended_within(process, TIMEOUT)
    output = stop(process)
    if not ended or process.returncode:
        words = f"{arguments[0]} {'failed' if ended else 'did not end'}: {output[-600:]}"
        if lost is None:
            raise InputError(words)
        lost.append(words)
    return output


def look(out: Path, tally: Tally) -> str:
    """Count what a kill left behind."""
    names = [path.name for path in (out / "checkpoints").iterdir()] if (out / "checkpoints").exists() else []
    saved = sorted(int(name) for name in names if name.isdigit())
    writing = any(".orbax-checkpoint-tmp" in name for name in names)
    tally.in_a_save += writing
    tally.before_any += not saved
    where = f"after checkpoint {saved[-1]}" if saved else "before the first checkpoint"
    return f"{where}, in a save" if writing else where


def resumed_at(output: str) -> list[int]:
    """The steps in the lines "resumed at step N of M"."""
    words = [line.split() for line in output.splitlines() if line.startswith("resumed at step ")]
    return [int(line[3]) for line in words]


def differences(whole: Path, other: Path) -> list[str]:
    """In what a resumed run is not the uninterrupted one: arrays of dictionaries by their bits, lines of the log."""
    found = []
    paths = [path.relative_to(whole) for path in sorted(whole.glob("dictionaries/**/params.safetensors"))]
    for path in paths or [Path("dictionaries")]:
        if not (other / path).is_file():
            found.append(f"{other.name}: {path} is missing")
            continue
        one, two = load_file(whole / path), load_file(other / path)
        found += [f"{other.name}: {path} {name}" for name in one if one[name].tobytes() != two[name].tobytes()]
    # A run that goes on logs its first step too.
    lines = logged(other)
    if any(lines.get(key) != row for key, row in logged(whole).items()):
        found.append(f"{other.name}: metrics.jsonl")
    return found


def logged(out: Path) -> dict[tuple, dict]:
    """The lines of a run's log by what they are of."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["step"], row.get("member"), "resampled" in row, "share" in row): row for row in rows}


def print_table(tallies: dict[str, Tally]) -> None:
    """One line a case, and what was lost."""
    print(f"\n{'':18} {'runs':>5} {'kills':>6} {'in a save':>10} {'before any':>11} {'lost':>5}   resumed at steps")
    for name, tally in tallies.items():
        print(
            f"{name:18} {tally.runs:5} {tally.kills:6} {tally.in_a_save:10} {tally.before_any:11} "
            f"{len(tally.lost):5}   {' '.join(map(str, tally.resumed_at))}"
        )
    kills, lost = (
        sum(tally.kills for tally in tallies.values()),
        [each for tally in tallies.values() for each in tally.lost],
    )
    print(f"{kills} kills, {'none lost: every bit as without' if not lost else 'LOST: ' + '; '.join(lost)}")


def small_model(folder: Path) -> Path:
    """A random model in Hugging Face's layout with the embedded model's tokenizer."""
    from sparse_jax.lm.embedded import MODELS
    from sparse_jax.lm.families.gpt_neox import read_config, weights
    from sparse_jax.lm.weight_map import leaves

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS["novel-neox"] / name, folder / name)
    config, rng, tensors = read_config(CONFIG), np.random.default_rng(0), {}
    for path, weight in leaves(weights(config)):
        for layer in range(config.n_layers) if path[0] == "blocks" else (None,):
            draw = rng.normal(size=weight.shape).astype(np.float32)
            tensors[weight.source.format(layer=layer)] = draw if path[-1] == "tokens" else 0.3 * draw
    save_file(tensors, folder / "model.safetensors")
    return folder


def small_text(path: Path) -> Path:
    """30 documents of random words, about 30,000 tokens."""
    words = np.array("the cat and dog ran over a hill while rain fell on old stones near our house".split())
    rng = np.random.default_rng(0)
    path.write_text("<|endoftext|>".join(" ".join(rng.choice(words, 800)) for _ in range(30)))
    return path


if __name__ == "__main__":
    command.main(Flags, main)
