"""Data parallel training's wrappers around a patched model, with one process on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import VIDEO_AUDIO, build_inputs

CONFIG = FMDConfig(fork_layers=2, masking="zero", alpha=0.7).resolve(FMDConfig(), 4)

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_layers(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize("wrap", [sharded_layers, fully_sharded, distributed], ids=lambda wrap: wrap.__name__)
def test_a_wrapped_model(wrap, first):
    inputs, model = build_inputs([VIDEO_AUDIO]), tiny_thinker(seed=0)
    vanilla, expected = model(**inputs).logits, reference_logits(model, CONFIG, **inputs)
    if first == "patch":
        fmd_ext.patch(model, CONFIG)
    wrapped = wrap(model)
    if first == "wrap":
        fmd_ext.patch(model, CONFIG)
    handle = fmd_ext.handle_of(model)
    torch.testing.assert_close(wrapped(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert handle.is_in_force and handle.last_call.plan.forked.all()
    handle.unpatch()
    torch.testing.assert_close(wrapped(**inputs).logits, vanilla, atol=1e-5, rtol=0)
