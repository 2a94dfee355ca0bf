"""A module's own view of the model's config: a few fields differ, all others are read from the original.

Whatever changes the model's config (`set_attn_implementation`, for example) so reaches every module.
"""

from typing import Any


class ConfigView:
    """Reads like `config`, with some fields replaced.

    Args:
        config: the original; read at every access.
        fields: values of fields that differ.
        attention_prefix: put in front of the attention implementation's name.
    """

    def __init__(self, config: Any, fields: dict[str, Any] | None = None, attention_prefix: str = "") -> None:
        self.__dict__.update(_config=config, _fields=dict(fields or {}), _prefix=attention_prefix)

    def copy(self) -> "ConfigView":
        """Another view of the same config, with fields of its own."""
        return ConfigView(self._config, self._fields, self._prefix)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        if name in self._fields:
            return self._fields[name]
        value = getattr(self._config, name)
        return f"{self._prefix}{value}" if self._prefix and name == "_attn_implementation" else value

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[name] = value
