"""The README's tables of dictionaries, written from the committed results of `benchmarks.quality`.

python -m benchmarks.quality_readme            rewrite the tables in README.md
python -m benchmarks.quality_readme --check    exit 1 if README.md is not what the results say
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality_table import read_results
from benchmarks.quality_trial import ARCHITECTURES, LIBRARIES
from experiments import command
from sparse_jax.errors import InputError

# benchmark's name -> (flags of train_sae, source)
OURS = {
    "topk": ("topk --k 32", "Gao et al. 2024"),
    "batch-topk": ("batch-topk --k 32", "Bussmann et al. 2024"),
    "multi-topk": ("multi-topk --k 32", "Gao et al. 2024"),
    "matching-pursuit": ("matching-pursuit --k 32", "Costa et al. 2025"),
    "jump-relu": ("--target-l0 32 jump-relu", "Rajamanoharan et al. 2024b"),
    "gated": ("--target-l0 32 gated", "Rajamanoharan et al. 2024a"),
    "matryoshka": ("matryoshka --k 32", "Bussmann et al. 2025"),
    "lp": ("--target-l0 32 lp", "Karvonen et al. 2024"),
    "standard": ("--target-l0 32 l1", "Bricken et al. 2023"),
}
FLOORS = {"pca": "PCA rotation", "neurons": "neurons", "random": "random dictionary"}


@dataclass(frozen=True)
class Flags:
    """Write the README's tables of dictionaries from the committed results."""

    results: Path = Path("benchmarks/quality_results")
    """What `benchmarks.quality` wrote."""
    readme: Path = Path("README.md")
    """The file with the marked places."""
    check: bool = False
    """Only compare."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Write, or compare; returns the exit code."""
    text = flags.readme.read_text(encoding="utf8")
    new = with_tables(text, read_results(flags.results))
    if flags.check:
        if new != text:
            print(f"{flags.readme} is not what {flags.results} says: run python -m benchmarks.quality_readme")
        return int(new != text)
    flags.readme.write_text(new, encoding="utf8")
    return 0


def with_tables(text: str, results: dict) -> str:
    """The text with what stands between the marks written anew.

    Raises:
        InputError: there are no marks.
    """
    for name, table in (("ours", ours_table(results)), ("peers", peers_table(results))):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, began, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not began or not ended:
            raise InputError(f"the text has no place marked {begin.strip()} ... {end}: put the marks back")
        text = before + begin + table + end + after
    return text


def ours_table(results: dict) -> str:
    """Our architectures, the best FVU first, and the floors."""
    rows = sorted((row for row in results["rows"] if row["library"] == "sparse_jax"), key=lambda row: row["raw_fvu"][0])
    lines = ["| `train_sae ...` | source | seeds | L0 | FVU | CE increase | dead |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        flags, source = OURS[row["architecture"]]
        lines.append(
            f"| `{flags}` | {source} | {row['seeds']} | {row['l0'][0]:.1f} | {_figure(row['raw_fvu'], row['seeds'])} | "
            f"{_figure(row['ce_increase'], row['seeds'])} | {100 * row['dead'][0]:.1f} % |"
        )
    for name, label in FLOORS.items():
        figures = results["floors"][f"{name} 32"]
        lines.append(f"| {label}, top 32 | | | 32.0 | {figures['fvu']:.4f} | {figures['ce_increase']:.4f} | |")
    return "\n".join(lines) + "\n"


def peers_table(results: dict) -> str:
    """L0, FVU at the wished L0 and CE increase of each library, for the architectures that all have been run with."""
    by_name = {(row["library"], row["architecture"]): row for row in results["rows"]}
    names = {"sparse_jax": "sparse_jax", "saelens": "SAELens", "dictionary_learning": "dictionary_learning"}
    heads = [f"{names[library]}: {what}" for library in LIBRARIES for what in ("L0", "FVU", "CE")]
    lines = ["| architecture (seeds) | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for architecture in ARCHITECTURES:
        rows = [by_name.get((library, architecture)) for library in LIBRARIES]
        if all(rows):
            cells = [
                f"{r['l0'][0]:.1f} | {_figure(r['fvu'], r['seeds'])} | {_figure(r['ce_increase'], r['seeds'])}"
                for r in rows
            ]
            lines.append(f"| {architecture} ({'/'.join(str(r['seeds']) for r in rows)}) | " + " | ".join(cells) + " |")
    if len(lines) == 2:
        return "No architecture has been run with all three libraries yet.\n"
    return "\n".join(lines) + "\n"


def _figure(value: tuple[float, float], count: int, digits: int = 4) -> str:
    """Mean, and spread over seeds where there are several."""
    mean, spread = value
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if count > 1 else f"{mean:.{digits}f}"


if __name__ == "__main__":
    command.main(Flags, main)
