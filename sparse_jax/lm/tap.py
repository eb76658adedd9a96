"""The tap: what a block calls at every site while it is traced."""

from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Tap:
    """Called as `tap(name, value)` at every site of a block; what it returns is what the block goes on with.

    Attributes:
        fn: (name, value) -> value, called only at the watched sites.
        watched: names at which `fn` reads or changes the value. A block may skip making a value that nobody watches
            (the attention pattern, which is by far the largest).
    """

    fn: Callable[[str, jax.Array], jax.Array] = lambda name, value: value
    watched: frozenset[str] = frozenset()

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        return self.fn(name, value) if name in self.watched else value


NO_TAP = Tap()
