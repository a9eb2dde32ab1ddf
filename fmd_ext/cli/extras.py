"""What a command needs beyond the package's own dependencies: told in one line, before anything is loaded or read."""

from __future__ import annotations

import argparse
import importlib.util

from fmd_ext.cli.errors import UserError
from fmd_ext.torchvision_mend import torchvision_advice

INSTALL = {  # what brings a module
    "torchvision": torchvision_advice,  # the one that fits the installed torch
    "scipy": lambda: "pip install 'fmd-ext[eval]'",
    "matplotlib": lambda: "pip install 'fmd-ext[plots]'",
}


def check_extras(args: argparse.Namespace) -> None:
    """Raises UserError naming the first package that the command line needs and that is not installed."""
    for module, purpose in _needed(args).items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{purpose} needs {module}, which is not installed: {INSTALL[module]()}")


def _needed(args: argparse.Namespace) -> dict[str, str]:
    """The modules, and what each is for."""
    if getattr(args, "list", False):
        return {}
    needed = {}
    if args.command in ("eval", "calibrate", "compare", "curves") and not getattr(args, "check", False):
        needed["scipy"] = f"fmd-ext {args.command}"
    if args.command == "curves":
        needed["matplotlib"] = "fmd-ext curves"
    for option in ("plots", "picture"):
        if getattr(args, option, None) is not None:
            needed["matplotlib"] = f"--{option}"
    if uses_built_in_model(args) or args.command == "demo":
        needed["torchvision"] = "the built-in model's video processor, which is transformers',"
    return needed


def uses_built_in_model(args: argparse.Namespace) -> bool:
    """Whether the command answers by a model and none is named."""
    idle = any(getattr(args, name, False) for name in ("list", "check", "score_only"))
    return not idle and getattr(args, "model", "") is None
