"""What transformers' PyTorch implementations compute with the tiny models of `reference/`.

    .venv/bin/python -m tests.lm.make_golden

from the repository's root writes `golden/NAME.npz` for each model: the value at every site and the logits, in float32
and float64. Making them needs torch and transformers; `test_golden.py`, which holds the ports to them, needs neither,
since the weights come from NumPy. `test_parity_torch.py` runs the same reference live.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.lm.reference.models import MODELS, fingerprint, random_tensors, random_tokens, sites, write_model
from tests.lm.reference.torch_models import torch_model, torch_values

FOLDER = Path(__file__).parent / "golden"
DTYPES = ("float32", "float64")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, tiny in MODELS.items():
        golden = {"fingerprint": np.array(fingerprint(tiny))}
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), tiny.config, random_tensors(tiny.config))
            for dtype in DTYPES:
                found = torch_values(torch_model(Path(folder), dtype), random_tokens(tiny))
                if set(found) != {*sites(tiny.config), "logits"}:
                    raise ValueError(f"{name}: hooks missed {set(sites(tiny.config)) ^ set(found)}")
                golden |= {f"{dtype} {site}": value for site, value in found.items()}
        np.savez_compressed(FOLDER / f"{name}.npz", **golden)
        print(f"{name}: {len(golden)} arrays, {(FOLDER / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
