"""Print texts on which features of a trained dictionary, or neurons of its site, fire: to read them in a terminal.

    python -m experiments.contexts --run runs/demo --features 12 40 --count 20

The places are drawn uniformly from all at which the feature fires on the run's evaluation text, those shown in its
report left out (--include-shown to keep them). The token at which it fires is written [[so]].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, run_folder
from experiments.data import Data, load_data
from experiments.measuring import eval_rows, in_float32
from experiments.train_sae import Flags as TrainFlags
from sparse_jax.activations import Statistics
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import Neurons, Normalised, from_json, load
from sparse_jax.errors import InputError
from sparse_jax.features import feature_activity, sample_across_range, sample_uniformly, window
from sparse_jax.training import Schedule, reconstructor


@dataclass(frozen=True)
class Flags:
    """Print texts on which features of a trained dictionary, or neurons of its site, fire."""

    run: Path
    """Run folder of train_sae."""
    features: tuple[int, ...] = ()
    """Numbers of features (or neurons); by default those of the report (or the first `neurons-shown` drawn)."""
    basis: Literal["dictionary", "neurons"] = "dictionary"
    """What is read: the run's dictionary, or its site's neurons, of which each token keeps the k largest."""
    k: int = 32
    """Neurons that each token keeps, by |coefficient|; only the positive ones are shown."""
    count: int = 20
    """Places to print for each."""
    at_least: float = 0.0
    """Only places where the activation is at least this share of its maximum."""
    include_shown: bool = False
    """Also draw from rows of text that the report shows."""
    only_shown: bool = False
    """Print just the places that the report shows (for neurons: would show)."""
    seed: int = 1
    """Decides which places are drawn."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    if flags.count < 1 or flags.k < 1 or not 0 <= flags.at_least <= 1:
        raise InputError("--count and --k must be positive, --at-least a share from 0 to 1")
    trained_with = train_flags(flags.run)
    (data,) = load_data(trained_with, trained_with.site)
    data = data.in_float32()
    trained = in_float32(load(flags.run))
    numbers = eval_rows(data, trained_with.eval_tokens)
    if flags.basis == "neurons":
        trained = neurons(flags, data)
    features = flags.features or report_features(flags.run, trained_with, data, trained, numbers)
    n_features = trained.dictionary.n_features
    if wrong := [f for f in features if not 0 <= f < n_features]:
        raise InputError(f"features {wrong}: the {flags.basis} has numbers 0 to {n_features - 1}")
    rebuild = reconstructor(trained)
    activity = feature_activity(data.lm, data.site, data.evaluation, numbers, rebuild.encode, rebuild.params, features)
    for column, feature in enumerate(features):
        show(flags, trained_with.seed, data, activity, column, feature)
    return 0


def train_flags(run: Path) -> TrainFlags:
    """The flags that a run was trained with, from its config.json.

    Raises:
        InputError: there is no run, or another experiment's.
    """
    saved = run_folder.read_config(run)["flags"]
    if unknown := sorted(set(saved) - set(TrainFlags.__dataclass_fields__)):
        raise InputError(f"{run} is no run of train_sae: its flags have {', '.join(unknown)}")
    saved["dictionary"] = from_json(saved["dictionary"])
    saved["schedule"] = Schedule(**saved["schedule"])
    saved["resample_at"] = tuple(saved["resample_at"])
    saved["out"] = Path(saved["out"])
    saved["store"] = None  # what it decided stands in the other flags; held-out text is run through the model
    return TrainFlags(**saved)


def neurons(flags: Flags, data: Data) -> Normalised:
    """The site's neurons, centred on the training mean, each token keeping its k largest."""
    statistics = Statistics.load(flags.run / "statistics.npz")
    d = data.width
    identity = Normaliser(jnp.zeros(d, jnp.float32), jnp.ones((), jnp.float32))
    dictionary = Neurons(n_features=d, d_in=d, d_out=d, k=flags.k)
    return Normalised(dictionary, dictionary.fit(jnp.array(statistics.mean, jnp.float32)), identity)


def report_features(
    run: Path, trained_with: TrainFlags, data: Data, trained: Normalised, numbers: np.ndarray
) -> tuple[int, ...]:
    """The features drawn for the report: uniformly from those that fire on the evaluation text."""
    from experiments.train_sae_report import draw_features
    from sparse_jax.activations import activations

    encode = jax.jit(lambda trained, x: jnp.sum(trained.encode(x) > 0, axis=0))
    fired = np.zeros(trained.dictionary.n_features, np.int64)
    for start in range(0, len(numbers), 32):
        tokens, _, mask, _ = data.evaluation[numbers[start : start + 32]]
        x = activations(data.lm, jnp.array(tokens), data.site)
        fired += np.asarray(encode(trained, x[jnp.array(mask)]))
    return tuple(int(f) for f in draw_features(fired, trained_with.report_features, trained_with.seed))


def show(flags: Flags, report_seed: int, data: Data, activity, column: int, feature: int) -> None:
    """Print the places of one feature."""
    values = activity.values[:, :, column]
    firing = activity.mask & (values > 0)
    top = float(np.where(firing, values, 0).max()) if firing.any() else 0.0
    shown = sample_across_range(values, activity.mask, report_seed)
    if flags.only_shown:
        places = [(row, position) for row, position, _ in shown]
    else:
        without = () if flags.include_shown else [row for row, _, _ in shown]
        strong = activity.mask & (values >= flags.at_least * top)
        places = sample_uniformly(values, strong, flags.count, flags.seed, without)
    print(f"\n=== {flags.basis} {feature}: fires on {100 * firing.sum() / activity.mask.sum():.3f} %, max {top:.2f}")
    for row, position in places:
        part = window(position, values.shape[1], before=20, after=8)
        tokens, _, _, _ = data.evaluation[int(activity.rows[row])]
        strings = data.tokenizer.token_strings(tokens[part])
        peak = position - part.start
        line = "".join([*strings[:peak], f"[[{strings[peak]}]]", *strings[peak + 1 :]]).replace("\n", "↵")
        print(f"{values[row, position] / top:5.2f}  {line}")


if __name__ == "__main__":
    command.main(Flags, main)
