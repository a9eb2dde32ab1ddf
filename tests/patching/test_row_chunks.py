"""MLPs of many rows, some at a time: the same results on every family, less memory, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmd_ext
from families import FAMILIES
from fmd_ext.adapters import find_adapter
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.patching.fusions import row_chunks
from omni_inputs import VIDEO_AUDIO, build_inputs
from traces import snapshot

# MLPs of decoder and encoders. Experts, and layers that hold their linears themselves (Whisper's), get all rows.
PLACES = {
    "qwen2_5_omni": 6,
    "qwen3_omni": 3,
    "phi4_multimodal": 8,
    "text": 4,
    "videollama2_qwen2": 7,
    "videollama2_mistral": 7,
    "video_salmonn": 6,
    "video_salmonn2": 5,
    "video_salmonn2_plus_inference": 6,
    "video_salmonn2_plus_training": 6,
}


@pytest.fixture(params=[1, 5])
def few_rows(monkeypatch, request):
    monkeypatch.setattr(row_chunks, "MOST_ROWS", request.param)


@pytest.mark.parametrize("family", FAMILIES.items(), ids=list(FAMILIES))
def test_every_family_computes_the_same_and_is_itself_again(family, monkeypatch):
    name, family = family
    model = family.make()
    inputs = family.inputs(model)
    labels = {name: inputs.pop(name) for name in ("modality_labels",) if name in inputs}
    model(**inputs)  # transformers leaves marks of its own on the first call
    traces = snapshot(model)
    handle = fmd_ext.patch(model, fork_layers=2, **family.patch)
    assert handle.fusions["mlp_chunks"].places == PLACES[name]
    whole = model(**inputs, **labels).logits
    seen = []
    monkeypatch.setattr(row_chunks, "MOST_ROWS", 5)
    original = row_chunks.in_chunks
    monkeypatch.setattr(row_chunks, "in_chunks", lambda *args: seen.append(args[1].shape) or original(*args))
    chunked = model(**inputs, **labels).logits
    assert len(seen) >= 2
    torch.testing.assert_close(chunked, whole, atol=2e-5, rtol=0)
    handle.unpatch()
    after = snapshot(model)
    assert traces.keys() == after.keys()
    assert [key for key in traces if traces[key] is not after[key] and traces[key] != after[key]] == []


@pytest.mark.parametrize("shape", [(9, 4), (1, 9, 4), (2, 3, 5, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_chunks_are_put_together(shape, size):
    hidden = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    most = []

    def mlp(rows):
        most.append(rows.shape[-2])
        assert rows.dim() == hidden.dim()
        return torch.cat([rows, 2 * rows], -1)

    out = row_chunks.in_chunks(mlp, hidden, size)
    if hidden.numel():
        assert torch.equal(out, torch.cat([hidden, 2 * hidden], -1)) and max(most) <= size


def test_chunks_are_equal_and_no_more_than_needed(monkeypatch):
    """4,097 rows are 2,049 and 2,048: not 4,096 and one."""
    monkeypatch.setattr(row_chunks, "MOST_ROWS", 8)
    seen = []
    chunked = row_chunks.ChunkedRows(None, lambda rows: seen.append(rows.shape[-2]) or rows)
    with torch.no_grad():
        for count in (8, 9, 17, 24):
            chunked(nn.Identity(), torch.zeros(1, count, 2))
    assert seen == [8, 5, 4, 6, 6, 5, 8, 8, 8]


class TestWhereItIsLeftOff:
    def told(self, change):
        model = tiny_thinker()
        change(model, find_adapter(model).find_decoder(model).layers[0].mlp)
        with fmd_ext.patch(model, fork_layers=1) as handle:
            fusion = handle.fusions["mlp_chunks"]
        assert fusion.places < 6
        return fusion.why_not

    def test_hooks(self):
        told = self.told(lambda model, mlp: mlp.up_proj.register_forward_hook(lambda *args: None))
        assert told == "a linear has hooks"

    def test_rows_know_of_each_other(self):
        class Normalised(nn.SiLU):
            def forward(self, rows):
                return super().forward(rows / rows.abs().max())

        told = self.told(lambda model, mlp: setattr(mlp, "act_fn", Normalised()))
        assert told.startswith("on a trial Qwen2MLP differs by")

    def test_another_forward(self):
        told = self.told(lambda model, mlp: setattr(mlp, "forward", mlp.forward))
        assert told == "something else has replaced the forward of this Qwen2MLP"

    def test_switched_off(self):
        with fmd_ext.patch(tiny_thinker(), fork_layers=1, fusions=False) as handle:
            assert handle.fusions["mlp_chunks"].places == 0


def test_a_copy_runs_its_own(few_rows):
    model, inputs = tiny_thinker(), build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(model, fork_layers=2)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_adapter(copied).find_decoder(copied).layers:
            layer.mlp.down_proj.weight.zero_()
    assert not torch.allclose(model(**inputs).logits, copied(**inputs).logits)
