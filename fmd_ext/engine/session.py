"""The state of a patch: its settings, the call that is running, and the prompt of the running `generate`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch

from fmd_ext.config import FMDConfig
from fmd_ext.engine.call import Call
from fmd_ext.engine.plan import Plan
from fmd_ext.engine.prompt import Prompt, check_labels
from fmd_ext.engine.routes import Routes

# (plan, labels [batch, length], state of the cache) -> the call; see `fmd_ext.engine.auto`
OpenCall = Callable[[Plan, np.ndarray, Any], Call]


class OneAtATime:
    """A reentrant lock. A deep copy of a model that holds one gets a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> OneAtATime:
        return OneAtATime()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled, which is how torch.save keeps a whole model: unpatch it first, or save "
            "its weights (save_pretrained, state_dict), which are those of the unpatched model"
        )


class _Holding(contextlib.AbstractContextManager):
    """A context in which an attribute has another value. Not by a generator, which costs several times as much: two are
    entered in every decode step."""

    def __init__(self, holder: Any, name: str, value: Any) -> None:
        self.holder, self.name, self.value = holder, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.holder, self.name)
        setattr(self.holder, self.name, self.value)

    def __exit__(self, *exception: object) -> None:
        setattr(self.holder, self.name, self.before)


class Session:
    """State that the replaced methods of one patched model share.

    Args:
        config: the resolved settings.
        open_call: creates the `Call` of a forward call where a setting is "auto"; None where no setting is.

    Attributes:
        lock: held during every call. The state describes one call, so threads run one after another.
        call: the call that is running, else None.
        last_call: the last call that succeeded; None before the first.
        incoming: while a forward call of the entry runs, its prompt and its number of positions, cached ones
            included; else None. The decoder's call belongs to that prompt.
        generating: the prompt of the ``generate`` call that is running.
    """

    def __init__(self, config: FMDConfig, open_call: OpenCall | None = None) -> None:
        self.lock = OneAtATime()
        self.config = config
        self.call: Call | None = None
        self.last_call: Call | None = None
        self.incoming: tuple[Prompt, int] | None = None
        self.generating: Prompt | None = None
        self._open_call = open_call
        self._labels: Prompt | None = None
        self._routes: Routes | None = None
        self._merge_weights: dict[tuple, torch.Tensor] = {}

    @contextlib.contextmanager
    def labels(self, modality_labels: Any) -> Iterator[None]:
        """Within this context all calls' positions carry ``modality_labels``; see `Handle.labels`."""
        prompt = Prompt(check_labels(modality_labels))
        with self.lock, self._holding("_labels", prompt):
            yield

    @contextlib.contextmanager
    def routed(self, routes: Routes) -> Iterator[None]:
        """Within this context ``routes`` are those of all calls' samples; see `Handle.routed`."""
        with self.lock, self._holding("_routes", routes):
            yield

    @property
    def routes_of_context(self) -> Routes | None:
        return self._routes

    @property
    def labels_of_context(self) -> Prompt | None:
        return self._labels

    def receiving(self, prompt: Prompt, length: int) -> contextlib.AbstractContextManager:
        """The context of a forward call of the entry with ``length`` positions of ``prompt``, cached ones included."""
        return self._holding("incoming", (prompt, length))

    def generating_from(self, prompt: Prompt) -> contextlib.AbstractContextManager:
        """The context of a ``generate`` call."""
        return self._holding("generating", prompt)

    def running(self, call: Call) -> contextlib.AbstractContextManager:
        """The context in which the decoder's layers run ``call``."""
        return self._holding("call", call)

    def _holding(self, name: str, value: Any) -> contextlib.AbstractContextManager:
        return _Holding(self, name, value)

    def open_call(self, plan: Plan, labels: np.ndarray, state: Any) -> Call:
        """The call that runs ``plan`` over the cache of ``state``."""
        if self._open_call is not None:
            return self._open_call(plan, labels, state)
        return Call(plan, cast(int, self.config.fork_layers), state.home_weights)

    def merge_weights(self, device: torch.device) -> torch.Tensor:
        """The config's `merge_weights`, float32 [4]. Cached: a copy per call would wait for the device."""
        key = (self.config.merge_weights, device)
        if key not in self._merge_weights:
            self._merge_weights[key] = torch.tensor(key[0], dtype=torch.float32, device=device)
        return self._merge_weights[key]
