"""What makes a captured step stale, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmd_ext.decode.fingerprint import fingerprint, hooked


class Adapted(nn.Linear):
    """A layer with the switches of an adapter, as PEFT's layers hold them."""

    def __init__(self):
        super().__init__(3, 3)
        self.scaling, self.merged_adapters, self._disable_adapters = {"default": 1.0}, [], False


def change_scaling(layer):
    layer.scaling["default"] = 2.0


def merge(layer):
    layer.merged_adapters.append("default")


def switch_off(layer):
    layer._disable_adapters = True


def move(layer):
    layer.weight.data = layer.weight.data.clone()


def replace(layer):
    layer.bias = None


def wrap(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x)


def reinterpret(layer):
    layer.requires_grad_(False).weight.data = layer.weight.data.view(torch.int32)  # the same memory


def hook(layer):
    layer.register_forward_hook(lambda module, args, out: None)


def hook_before(layer):
    layer.register_forward_pre_hook(lambda module, args: None)


CHANGES = [change_scaling, merge, switch_off, move, replace, reinterpret, wrap, hook, hook_before, nn.Module.train]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows(change):
    model = nn.Sequential(nn.ReLU(), Adapted()).eval()
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model[1])
    assert fingerprint(model) != before


def test_running_and_writing_in_place_does_not():
    model = nn.Sequential(nn.ReLU(), Adapted()).eval()
    before = fingerprint(model)
    model(torch.randn(2, 3))
    with torch.no_grad():
        model[1].weight.mul_(2)
    model[1].last_seen = torch.randn(2)  # as models keep what a call computed
    noted = fingerprint(model)
    model[1].last_seen = torch.randn(2)
    assert fingerprint(model) == noted != before


def test_hooks_of_libraries_are_told_from_the_users():
    model = nn.Sequential(nn.ReLU(), Adapted())
    assert hooked(model) == ""

    def of_library(module, args):
        return None

    of_library.__module__ = "transformers.utils.output_capturing"
    model[1].register_forward_pre_hook(of_library)
    assert hooked(model) == ""
    model[1].register_forward_hook(lambda module, args, out: None)
    assert hooked(model) == "1" and hooked(model[1]) == "Adapted"
