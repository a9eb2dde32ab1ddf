"""torchvision beside any torch: the mend of an import that would fail, and the version that belongs to a torch."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# torch drops an op's registration when its Library object is collected, so the declaration lives as long as the module.
_torchvision_declarations: list[torch.library.Library] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing: it is asked before torchvision is imported, mends, and takes itself away."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            mend_torchvision()


def mend_when_torchvision_is_imported() -> None:
    """`mend_torchvision` as late as it may come, since it takes torch, whose import takes seconds."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())


def torchvision_advice() -> str:
    """The command that installs the torchvision of the installed torch and touches nothing else.

    Up to torch 2.13, torchvision 0.(N + 15) belongs to torch 2.N alone; 0.29.2 asks for torch 2.14 or later. Without
    ``--no-deps`` pip would replace the torch if that is what the newest torchvision takes.
    """
    minor = int(importlib.metadata.version("torch").split(".")[1])
    wanted = f"==0.{minor + 15}.*" if minor < 14 else ">=0.29"
    return f"pip install --no-deps 'torchvision{wanted}'"


def mend_torchvision() -> str:
    """Makes ``import torchvision`` work beside a torch that its compiled ops cannot be loaded into.

    The torchvision wheel on PyPI is built for a CUDA torch. Beside a CPU-only torch its op library does not load, and
    then the whole import fails, because ``torchvision/_meta_registrations.py`` registers fake kernels for ops that
    nobody declared: "operator torchvision::nms does not exist". Declaring the schemas of these ops lets the import
    pass; torchvision's transforms, which is all that transformers' processors use, are plain PyTorch. Calling ``nms``
    itself still fails, with PyTorch's own message that it has no kernel.

    Must run before the first import of torchvision, hence before transformers loads an image or video processor.
    ``import fmd_ext`` sees to it. torchvision itself is not imported here.

    Returns: ``"absent"`` (torchvision is not installed), ``"healthy"`` (its own ops load) or ``"declared"`` (its ops do
    not load, their schemas are declared by this function).
    """
    if _torchvision_declarations:
        return "declared"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return "absent"
    if _torchvision_declarations:  # by the finder above, which the search for the spec has asked
        return "declared"
    import torch

    if _has_op("nms") or _load_torchvision_ops(Path(spec.submodule_search_locations[0])):
        return "healthy"

    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        if not _has_op(op):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_declarations.append(library)
    return "declared"


def _has_op(name: str) -> bool:
    import torch

    return hasattr(torch.ops.torchvision, name)


def _load_torchvision_ops(folder: Path) -> bool:
    """Loads the op library that ``import torchvision`` would load. A second load of it is a no-op."""
    import torch

    for path in sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            logger.info("torchvision's op library %s does not load beside torch %s: %s", path, torch.__version__, error)
            continue
        if _has_op("nms"):
            return True
    return False
