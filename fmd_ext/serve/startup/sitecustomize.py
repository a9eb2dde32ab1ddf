"""For processes that vLLM starts where torchvision does not fit torch: it is mended just before its first import.

vLLM imports torchvision long before it loads plugins. Python runs this file at its start when its folder is on
PYTHONPATH, where `fmd_ext.serve.environment` puts it if there is something to mend.
"""

from __future__ import annotations

import sys
from typing import Any


class _BeforeTorchvision:
    """Finds no module; being asked for torchvision is what it waits for."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(_BeforeTorchvision)
            from fmd_ext.torchvision_mend import mend_torchvision

            mend_torchvision()


sys.meta_path.insert(0, _BeforeTorchvision)
