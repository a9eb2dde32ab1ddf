"""Code of ours in the place of the attention function: seen by every layer, nested, and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from fmd_ext.lab.interception import intercepting
from omni_inputs import VIDEO_AUDIO, build_inputs


def noting(name, seen, factor=1.0):
    def interceptor(attend, module, query, key, value, mask, scale, **kwargs):
        seen.append((name, module.layer_idx))
        out, weights = attend(module, query, key, value, mask, scaling=scale, **kwargs)
        return out * factor, weights

    return interceptor


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nested_contexts_call_each_other_and_end_one_by_one(thinker, implementation):
    inputs, seen = build_inputs([VIDEO_AUDIO]), []
    thinker.set_attn_implementation(implementation)
    decoder = thinker.get_decoder()
    configs = [layer.self_attn.config for layer in decoder.layers]
    try:
        vanilla = thinker(**inputs).logits
        with intercepting(decoder, "self_attn", noting("outer", seen)):
            with intercepting(decoder, "self_attn", noting("inner", seen, factor=0.0)):
                inner = thinker(**inputs).logits
            both, seen[:] = list(seen), []
            assert torch.equal(thinker(**inputs).logits, vanilla)
        assert both == [(name, layer) for layer in range(4) for name in ("inner", "outer")]
        assert not torch.allclose(inner, vanilla)
        assert seen == [("outer", layer) for layer in range(4)]
        assert torch.equal(thinker(**inputs).logits, vanilla) and len(seen) == 4
        assert [layer.self_attn.config for layer in decoder.layers] == configs
        assert all("_fmd_interceptor" not in layer.self_attn.__dict__ for layer in decoder.layers)
    finally:
        thinker.set_attn_implementation("sdpa")


def test_an_error_within_takes_the_interceptor_out(thinker):
    with pytest.raises(KeyError), intercepting(thinker.get_decoder(), "self_attn", noting("one", [])):
        raise KeyError
    assert all("_fmd_interceptor" not in layer.self_attn.__dict__ for layer in thinker.get_decoder().layers)
