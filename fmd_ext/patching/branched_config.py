"""The config of a patched decoder: it shares the original's settings and names our attention."""

from __future__ import annotations

import copy
import functools
from typing import Any, SupportsIndex

from fmd_ext.engine.forward import ATTENTION_NAME

_ATTENTION = "_attn_implementation_internal"  # transformers 5: where a config keeps the name of its attention


class BranchedConfig:
    """A base put before a config's own class. The object shares its ``__dict__`` with the original config, so that what
    is set through either holds for both. Only the attention that layers read is ours. An attention that is set while
    the model is patched takes effect after `unpatch`.
    """

    __slots__ = ()
    _fmd_original: Any
    _fmd_attention: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Calls no base class: transformers' would make a dataclass, with an equality of its own, of a subclass."""

    @property
    def _attn_implementation_internal(self) -> str:
        return self._fmd_attention

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, name: str | None) -> None:
        self.__dict__[_ATTENTION] = name

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickled, it is the original."""
        return original_config, (self._fmd_original,)

    def __copy__(self) -> Any:
        return branched_config(copy.copy(self._fmd_original), self._fmd_attention)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return branched_config(copy.deepcopy(self._fmd_original, memo), self._fmd_attention)


def branched_config(config: Any, attention: str = ATTENTION_NAME) -> Any:
    """A `BranchedConfig` over ``config``, whose layers read the attention function ``attention``."""
    config = original_config(config)
    own: type = type(config)
    view: Any = object.__new__(_class_over(own))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_fmd_original", config)
    object.__setattr__(view, "_fmd_attention", attention)
    return view


def original_config(config: Any) -> Any:
    return config._fmd_original if isinstance(config, BranchedConfig) else config


@functools.cache
def _class_over(own: type) -> type:
    return type(
        own.__name__,
        (BranchedConfig, own),
        {"__slots__": ("_fmd_original", "_fmd_attention"), "__module__": own.__module__},
    )
