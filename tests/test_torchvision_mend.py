"""The torchvision mend, each case in a process of its own: registrations of ops cannot be undone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from paths import ROOT

# The file by its path: `import fmd_ext` would mend, and take seconds.
LOAD_MEND = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("torchvision_mend", {str(ROOT / "fmd_ext" / "torchvision_mend.py")!r})
mend = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mend)
"""

# What of torchvision matters here: an op library beside it, and an import that needs the ops' schemas.
TORCHVISION = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets.new_empty((0,), dtype=torch.long)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a torchvision whose op library does not load."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(TORCHVISION)
    (package / "_C.so").write_bytes(b"built for another torch")
    return tmp_path


def run(code, folder):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_a_torchvision_whose_ops_do_not_load_is_mended(folder):
    without = run("import torchvision", folder)
    assert without.returncode != 0 and "torchvision::nms does not exist" in without.stderr

    code = """
print(mend.mend_torchvision(), mend.mend_torchvision())
import torch, torchvision
try:
    torch.ops.torchvision.nms(torch.ones(1, 4), torch.ones(1), 0.5)
except NotImplementedError as error:  # a schema is no kernel
    print("torchvision::nms" in str(error))
"""
    mended = run(LOAD_MEND + code, folder)
    assert mended.returncode == 0, mended.stderr
    assert mended.stdout.split() == ["declared", "declared", "True"]


def test_a_healthy_torchvision_is_left_alone(folder):
    code = """
import torch
own = torch.library.Library("torchvision", "DEF")  # as its op library does when it loads
own.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
print(mend.mend_torchvision(), len(mend._torchvision_declarations), hasattr(torch.ops.torchvision, "qnms"))
import torchvision
"""
    result = run(LOAD_MEND + code, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["healthy", "0", "False"]


def test_without_torchvision_nothing_happens(tmp_path):
    code = """
import torch
importlib.util.find_spec = lambda name: None
print(mend.mend_torchvision(), hasattr(torch.ops.torchvision, "nms"))
"""
    result = run(LOAD_MEND + code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["absent", "False"]


def test_import_fmd_ext_mends_when_torchvision_comes(folder):
    """And not before, since that takes torch. Whoever looks for torchvision first mends, as transformers does."""
    code = f"""
sys.path.insert(0, {str(ROOT)!r})
import fmd_ext
print("torch" in sys.modules, len(sys.meta_path))
import torchvision
print("torch" in sys.modules, len(sys.meta_path), torch.ops.torchvision.nms.default._schema.name)
""".replace("torch.ops", "sys.modules['torch'].ops")
    result = run(code, folder)
    assert result.returncode == 0, result.stderr
    (was_there, before), (is_there, after, name) = (line.split() for line in result.stdout.splitlines())
    assert (was_there, is_there, name) == ("False", "True", "torchvision::nms") and int(before) == int(after) + 1


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_installed_torchvision_can_resize():
    import torch
    import torchvision.transforms.v2.functional as transforms

    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    assert transforms.resize(image, [8, 4], antialias=True).shape == (3, 8, 4)


def test_what_the_finder_declared_is_not_taken_for_torchvisions_own(folder):
    """The mend's search for torchvision asks the finder, which mends in its turn."""
    code = f"""
sys.path.insert(0, {str(ROOT)!r})
import fmd_ext
from fmd_ext.torchvision_mend import mend_torchvision
print(mend_torchvision())
"""
    result = run(code, folder)
    assert result.returncode == 0 and result.stdout.split() == ["declared"], result.stderr
