"""What is put on a model's modules, whether it still runs, and how it comes off again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from fmd_ext.engine.compiling import as_python, is_called_by_compiled_code, untraced
from fmd_ext.engine.session import Session
from fmd_ext.patching.branched_config import BranchedConfig, branched_config, original_config

logger = logging.getLogger(__name__)

OVERRIDES = "_fmd_overrides"  # attribute of a module: its replacements by the name of the method
# accelerate: the forward of a module with a hook calls this attribute, which replaces it when the hook is removed.
UNDER_HOOK = "_old_forward"
HOOK = "_hf_hook"

Context = Callable[[dict[str, Any]], AbstractContextManager]


def no_context(call: dict[str, Any]) -> AbstractContextManager:
    return nullcontext()


class Absent:
    """Stands for an attribute that the instance did not have."""


@dataclasses.dataclass
class Change:
    """An attribute of a module that was set.

    Args:
        module, name: the attribute that was set; `UNDER_HOOK` for a method under a hook of accelerate.
        before: what the instance had there, or `Absent`.
        now: what was put there.
        method: the method's name; "" for other attributes.
        original: the method as it was.
    """

    module: nn.Module
    name: str
    before: Any
    now: Any
    method: str = ""
    original: Any = None

    @property
    def place(self) -> str:
        """Where the replacement is now; "" where it is no attribute of the module any more."""
        names = dict.fromkeys((self.name, self.method, UNDER_HOOK))
        return next((name for name in names if name and self.module.__dict__.get(name) is self.now), "")

    @property
    def still_runs(self) -> bool:
        """Whether a call of the method reaches the replacement, also through wrappers put around it since."""
        return _reaches(getattr(self.module, self.method, None), self.now, self.module)

    def __str__(self) -> str:
        return f"{self.method} of {type(self.module).__name__}"

    def undo(self) -> bool:
        """Puts back what was there. False where that drops something that others have put around the replacement."""
        held, place = self.module.__dict__, self.place if self.method else self.name
        if place == self.name:
            if self.before is Absent:
                held.pop(self.name, None)
            else:
                held[self.name] = self.before
            return True
        if place:  # accelerate has put a hook on, or taken one off, since
            held[place] = self.original
            return True
        if UNDER_HOOK in held:
            held[UNDER_HOOK] = self.original
        elif self.name == self.method and self.before is Absent:
            held.pop(self.method, None)
        else:
            held[self.method] = self.original
        return False


class PythonHook:
    """A forward pre-hook that no compiled module traces."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    @untraced
    def __call__(self, *args: Any) -> Any:
        return as_python(self.hook, *args)


class Guarded:
    """A replacement of a method that users call: runs one call at a time, uncompiled, within ``context(arguments)``."""

    def __init__(self, installation: Installation, replacement: Any, context: Context) -> None:
        self.installation = installation
        self.replacement = replacement
        self.context = context

    @untraced
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.installation.tell_of_compiling(module)
        return as_python(self._run, module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        with self.installation.session.lock:
            if self.installation.is_removed:  # while this thread waited for its turn
                _refuse_ours(module, kwargs)
                return self.replacement.original(*args, **kwargs)
            self.installation.refuse_replaced()
            with self.context(kwargs):
                return self.replacement(module, *args, **kwargs)


class Installation:
    """The changes of one patch.

    Attributes:
        is_removed: whether it has been taken off.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.is_removed = False
        self._changes: list[Change] = []
        self._guarded: list[Change] = []  # those of them that users call
        self._hooks: list[Any] = []
        self._afterwards: list[Callable[[], None]] = []
        self._seen: dict[int, tuple[int, int]] = {}
        self._said = False

    # --- putting on -------------------------------------------------------------------------------------------------

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._change(Change(module, name, module.__dict__.get(name, Absent), value))

    def branch_config(self, module: nn.Module) -> None:
        """Gives a module a config that selects our attention."""
        self.set(module, "config", branched_config(module.config))

    def override(
        self,
        module: nn.Module,
        method: str,
        factory: Any,
        *more: Any,
        context: Context | None = None,
    ) -> None:
        """Puts a method of the same signature on the instance, never on the class.

        ``context``: for methods that users call, see `Guarded`.
        """
        held = module.__dict__
        name = UNDER_HOOK if method == "forward" and HOOK in held and UNDER_HOOK in held else method
        original = getattr(module, name)
        if OVERRIDES not in held:
            self.set(module, OVERRIDES, {})
        replacement = factory(self.session, original, *more)
        held[OVERRIDES][method] = replacement if context is None else Guarded(self, replacement, context)
        ours = types.MethodType(_calling_override(method, original), module)
        change = Change(module, name, held.get(name, Absent), ours, method, original)
        self._change(change)
        if context is not None:
            self._guarded.append(change)

    def pre_hook(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(PythonHook(hook), with_kwargs=True))

    def on_removal(self, function: Callable[[], None]) -> None:
        """Has ``function`` called when the changes have been taken off."""
        self._afterwards.append(function)

    def refuse_replicas(self, module: nn.Module) -> None:
        """Refuses `nn.DataParallel`: its copies would keep the methods of this instance, which belong to its device."""
        self.set(module, "_replicate_for_data_parallel", _refuse_replicas)

    def _change(self, change: Change) -> None:
        self._changes.append(change)
        # Not by nn.Module.__setattr__, which would register a handle's modules as children.
        change.module.__dict__[change.name] = change.now

    # --- in force ---------------------------------------------------------------------------------------------------

    @property
    def replaced(self) -> list[str]:
        """The methods for users (`forward`, `generate`) whose calls no longer reach our replacement."""
        return [str(change) for change in self._guarded if not change.still_runs]

    def refuse_replaced(self) -> None:
        """Raises RuntimeError where something else has replaced one of the two forwards that fork a call."""
        for index, change in enumerate(self._guarded):
            held = change.module.__dict__
            now = id(held.get(change.method)), id(held.get(UNDER_HOOK))
            if change.method != "forward" or self._seen.get(index) == now:
                continue
            if not change.still_runs:
                raise RuntimeError(
                    f"the {change} was replaced after fmd_ext.patch, so that this call would not be forked: unpatch "
                    "the model and patch it again"
                )
            self._seen[index] = now

    def tell_of_compiling(self, module: nn.Module) -> None:
        if not self._said and is_called_by_compiled_code():
            self._said = True
            logger.warning(
                "fmd_ext: torch.compile does not compile the forward of a patched %s, which runs as it is; compile its "
                "layers or encoders by themselves",
                type(module).__name__,
            )

    # --- taking off -------------------------------------------------------------------------------------------------

    def remove(self, *roots: nn.Module) -> None:
        """Undoes all changes, also in modules below ``roots`` that were copied from patched ones."""
        for hook in self._hooks:
            hook.remove()
        lost = [str(change) for change in reversed(self._changes) if not change.undo()][::-1]
        if lost:
            logger.warning(
                "fmd_ext: unpatching also drops what has replaced our methods since the patch, such as a hook or a "
                "compiled function: %s%s; set it up again",
                ", ".join(lost[:3]),
                f" and {len(lost) - 3} more" if len(lost) > 3 else "",
            )
        for function in self._afterwards:
            function()
        self._hooks, self._changes, self._guarded, self._afterwards, self.is_removed = [], [], [], [], True
        for module in (module for root in roots for module in root.modules()):
            _strip(module)


def _strip(module: nn.Module) -> None:
    """Takes our changes off a module that was copied from a patched one, as PEFT's ``modules_to_save`` does."""
    held = module.__dict__
    for method in held.pop(OVERRIDES, {}):
        held.pop(method, None)
    for name in [name for name in held if name.startswith("_fmd")]:
        del held[name]
    if isinstance(held.get("config"), BranchedConfig):
        held["config"] = original_config(held["config"])
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, PythonHook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _calling_override(method: str, original: Any) -> Any:
    # Looked up through the module, so that a deep copy of a patched model runs its own replacement.
    def calling(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[OVERRIDES][method](self, *args, **kwargs)

    calling.__name__ = method
    calling.__doc__ = getattr(original, "__doc__", None)
    signature = inspect.signature(original)  # transformers inspects that of forward
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *signature.parameters.values()]
    calling.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # `inspect` reads it
    return calling


def _reaches(function: Any, target: Any, module: nn.Module) -> bool:
    """Whether ``function`` is ``target`` or holds it: in a closure, a partial, a wrapper, or a hook of accelerate."""
    seen: set[int] = set()
    waiting = [function]
    while waiting and len(seen) < 1000:
        held = waiting.pop()
        if held is target:
            return True
        if id(held) in seen:
            continue
        seen.add(id(held))
        if held is module:
            waiting.append(held.__dict__.get(UNDER_HOOK))
        elif isinstance(held, functools.partial):
            waiting += [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, types.MethodType):
            waiting += [held.__func__, held.__self__]
        elif isinstance(held, types.FunctionType):
            waiting += [*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values()]
            waiting += [cell.cell_contents for cell in held.__closure__ or () if _is_filled(cell)]
        elif callable(held) and not isinstance(held, (type, nn.Module)):
            waiting += getattr(held, "__dict__", {}).values()
    return False


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _refuse_ours(module: nn.Module, kwargs: dict[str, Any]) -> None:
    given = [name for name in ("modality_labels", "branch_embeds") if kwargs.pop(name, None) is not None]
    if given:
        raise ValueError(
            f"this {type(module).__name__} was unpatched while the call waited for its turn; only a patched one takes "
            f"{', '.join(given)}"
        )


def _refuse_replicas() -> Any:
    raise TypeError(
        "nn.DataParallel cannot replicate a patched model: run one process per device, each with a patched model, "
        "or unpatch it first"
    )
