"""Floor 2: activations of a language model in seeded blocks, their statistics, the normaliser."""

from sparse_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ActivationStore": "store",
        "Ahead": "ahead",
        "Block": "blocks",
        "Blocks": "blocks",
        "BlocksAt": "stored_blocks",
        "Entry": "row_encoding",
        "Manifest": "store",
        "RememberedBlocks": "blocks",
        "Normaliser": "normalise",
        "Share": "shares",
        "SiteBlock": "blocks",
        "SiteBlocks": "blocks",
        "Statistics": "statistics",
        "StoredBlocks": "stored_blocks",
        "activations": "blocks",
        "collect_site_statistics": "statistics",
        "collect_statistics": "statistics",
        "fit_normaliser": "normalise",
        "open_store": "store",
    },
)
