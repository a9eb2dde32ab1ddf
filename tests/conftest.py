"""Shared fixtures. fmd_ext comes first: it mends the environment before transformers loads its models."""

from __future__ import annotations

import fmd_ext  # isort: skip

import pytest
import torch

from fmd_ext.lab.tiny import tiny_omni, tiny_thinker

# The models are tiny: threads would only wait for each other. Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _thinker():
    return tiny_thinker(seed=0)


@pytest.fixture(scope="session")
def _omni():
    return tiny_omni(seed=0)


def _unpatched(model):
    yield model
    if fmd_ext.handle_of(model) is not None:
        fmd_ext.unpatch(model)


@pytest.fixture
def thinker(_thinker):
    """The tiny thinker (4 layers, 4 query and 2 key heads of 64, hidden 256); unpatched again afterwards."""
    yield from _unpatched(_thinker)


@pytest.fixture
def omni(_omni):
    """The tiny full model with talker and speech decoder; unpatched again afterwards."""
    yield from _unpatched(_omni)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
