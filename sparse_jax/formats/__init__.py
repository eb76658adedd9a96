"""Floor 3: other libraries' files, read and written."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "load_saelens": "saelens",
        "save_saelens": "saelens",
    },
)
