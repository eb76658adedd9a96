"""sparse_jax: from a language model to named features, as pure functions in JAX.

`import sparse_jax as sj` is cheap; each package (`sj.lm`, `sj.dictionaries`, ...) is imported when first used.
"""

import importlib

__version__ = "0.1.0"

_PACKAGES = (
    "activations",
    "coding",
    "connectors",
    "dictionaries",
    "features",
    "formats",
    "lm",
    "metrics",
    "numerics",
    "training",
)


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"sparse_jax.{name}")
    raise AttributeError(f"module 'sparse_jax' has no attribute {name!r}; it has {', '.join(_PACKAGES)}")


def __dir__() -> list[str]:
    return [*globals(), *_PACKAGES]
