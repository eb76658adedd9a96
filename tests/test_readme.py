"""The front page's Python runs as it stands there, in order, on a dictionary such as its first command trains, and on a
store such as its harvest makes.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import harvest
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import Normalised, TopK, save

README = Path(__file__).parents[1] / "README.md"
PROVENANCE = {"model": "novel-neox", "revision": None, "site": "resid_post.3", "context": 256, "bos": "none"}
# These need the network and eight devices.
NOT_RUN = ("meta-llama/",)


@pytest.mark.slow
def test_every_example_runs(tmp_path, monkeypatch):
    dictionary = TopK().sized(256, compute_dtype="float32")
    trained = Normalised(dictionary, dictionary.init(jax.random.key(0)), Normaliser(jnp.zeros(256), jnp.ones(())))
    save(tmp_path / "runs" / "demo" / "dictionaries" / "resid_post.3", trained, PROVENANCE)
    monkeypatch.chdir(tmp_path)
    stored = {"sites": ("resid_post.3", "mlp_out.3"), "dtype": "bfloat16", "tokens": 32 * 256, "reuse_memory": False}
    assert harvest.main(harvest.Flags(out=Path("runs/store"), **stored)) == 0
    names: dict = {}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf8"), re.DOTALL)
    run = [code for code in examples if not any(sign in code for sign in NOT_RUN)]
    assert len(run) >= 4
    assert len(examples) - len(run) == len(NOT_RUN)
    for code in run:
        exec(compile(code, str(README), "exec"), names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], 4096)
    assert (names["kept"].shape, names["there"].mask.shape) == ((2, 256, 256), (2, 256))
    assert names["made"].tokens.shape == (1, 100)
