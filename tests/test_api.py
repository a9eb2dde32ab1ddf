"""The promise of docs/api.md: it lists every public name, with the signature that the code has."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import fmd_ext
from fmd_ext import adapters, ops
from fmd_ext.cli.main import _parser
from paths import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


class _Bare:
    """An annotation without the quotes in which `inspect` shows a string."""

    def __init__(self, annotation: Any) -> None:
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=_Bare(p.annotation))
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    ]
    returned = signature.return_annotation
    returned = returned if returned is signature.empty else _Bare(returned)
    return str(signature.replace(parameters=parameters, return_annotation=returned))


def _public(names: Any) -> list[str]:
    return sorted(name for name in names if not name.startswith("_"))


def _members(owner: type, fields: set[str]) -> list[str]:
    """Methods and properties of a class that are not its fields, one line each."""
    lines = []
    for name in _public(set(vars(owner)) - fields):
        value = inspect.getattr_static(owner, name)
        if isinstance(value, property):
            lines.append(f"{owner.__name__}.{name}: {value.fget.__annotations__['return']}")
        else:
            lines.append(f"{owner.__name__}.{name}{_signature(getattr(owner, name))}")
    return lines


def _lines(name: str, value: Any) -> list[str]:
    """What the page says of one name: a signature, or a constant's value."""
    if value is fmd_ext.Handle:  # made by `patch` alone: its constructor is no promise
        return _members(value, {"install", "remove"})
    if inspect.isclass(value) and issubclass(value, Exception):
        return [f"{name}({value.__base__.__name__})"]
    if inspect.isclass(value):
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        is_made = bool(fields) or value is fmd_ext.Router
        made = [name + _signature(value).removesuffix(" -> None")] if is_made else []
        return made + _members(value, fields)
    return [name + _signature(value)] if callable(value) else [f"{name} = {value!r}"]


def _of_module(module: Any) -> list[str]:
    """Its public functions and classes, those imported from elsewhere left out."""
    return [
        name for name in _public(vars(module)) if getattr(getattr(module, name), "__module__", "") == module.__name__
    ]


def listing() -> dict[str, list[str]]:
    """Heading of the page -> its lines."""
    inputs = {name: importlib.import_module(name) for name in ("fmd_ext.inputs.chat", "fmd_ext.inputs.media")}
    named = {
        "fmd_ext": (fmd_ext, fmd_ext.__all__),
        **{name: (module, _of_module(module)) for name, module in inputs.items()},
        "fmd_ext.adapters": (adapters, [name for name in adapters.__all__ if name != "ADAPTERS"]),
        "fmd_ext.ops": (ops, ops.__all__),
    }
    lines = {
        heading: [line for name in sorted(names) for line in _lines(name, getattr(module, name))]
        for heading, (module, names) in named.items()
    }
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    return {**lines, "fmd-ext": sorted(commands)}


def test_the_page_lists_names_and_signatures():
    on_page = {
        heading: block.strip().splitlines()
        for heading, block in re.findall(
            r"(?m)^## `([^`\n]+)`\n(?:(?!^##|```).*\n)*```\w*\n((?:(?!```).*\n)*)```", PAGE
        )
    }
    actual = listing()
    assert sum(map(len, actual.values())) > 40
    assert list(on_page) == list(actual)
    for heading, lines in actual.items():
        assert on_page[heading] == lines, heading


def test_every_adapter_has_its_name_on_the_page():
    assert [name for name in adapters.ADAPTERS if f'"{name}"' not in PAGE] == []


def test_the_attention_implementation_has_its_name(thinker):
    config, module = thinker.config.get_text_config(), thinker.get_decoder().layers[0].self_attn
    before = config._attn_implementation
    assert before != "fmd_ext"
    with fmd_ext.patch(thinker, fork_layers=1):
        assert module.config._attn_implementation == "fmd_ext"
        assert config._attn_implementation == before
    assert module.config._attn_implementation == before
    assert fmd_ext.patch.__doc__.count('"fmd_ext"') == 1 and '"fmd_ext"' in PAGE
