"""Packages whose public names are imported when first used, so that a `--help` does not wait for all of them."""

import importlib
from collections.abc import Callable


def lazy_names(package: str, where: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package's `__init__`.

    Args:
        package: its `__name__`.
        where: public name -> submodule that defines it. No name may be that of a submodule, which would hide it.
    """

    def __getattr__(name: str):
        if name in where:
            return getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    names = sorted(where)
    return __getattr__, lambda: names, names
