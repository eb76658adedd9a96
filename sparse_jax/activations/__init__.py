"""Floor 2: activations of a language model in seeded blocks, their statistics, the normaliser."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Block": "blocks",
        "Blocks": "blocks",
        "RememberedBlocks": "blocks",
        "Normaliser": "normalise",
        "SiteBlock": "blocks",
        "SiteBlocks": "blocks",
        "Statistics": "statistics",
        "activations": "blocks",
        "collect_site_statistics": "statistics",
        "collect_statistics": "statistics",
        "fit_normaliser": "normalise",
    },
)
