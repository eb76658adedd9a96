"""Checked access to a model's `config.json`: a wrong value is told by name, before any weight is read."""

from dataclasses import dataclass
from typing import Any

from sparse_jax.errors import InputError

_REQUIRED = object()


@dataclass(frozen=True)
class ConfigJson:
    """The parsed `config.json` of a model.

    A key that is absent or null has its default, as in transformers; without a default it is an error.

    Attributes:
        raw: the JSON object.
        model_type: for error messages.
    """

    raw: dict[str, Any]
    model_type: str

    def require(self, *names: str) -> None:
        """Raises InputError that names every one that is absent or null."""
        if missing := [name for name in names if self.raw.get(name) is None]:
            raise InputError(f"config.json of a {self.model_type} model lacks {', '.join(missing)}")

    def integer(self, name: str, default: Any = _REQUIRED, at_least: int = 1) -> int:
        """An integer that is not below `at_least`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self._wrong(name, value, f"an integer, at least {at_least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number above zero."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def table(self, name: str) -> "ConfigJson":
        """The JSON object under `name`; an empty one where there is none."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "a JSON object")
        return ConfigJson(value, self.model_type)

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default is _REQUIRED:
            self.require(name)
        return default if value is None else value

    def _wrong(self, name: str, value: Any, allowed: str) -> InputError:
        return InputError(f"config.json of a {self.model_type} model has {name} {value!r}; it must be {allowed}")
