"""Fork-merge decoding with the ops by torch's own operations: the scenarios of the kernels, against the same reference.

Other devices than CPUs and CUDA GPUs run this path. Here it runs on the CPU.
"""

from __future__ import annotations

import logging

import pytest
import torch
from test_cache import (  # noqa: F401
    test_crop_gives_back_text_only,
    test_many_steps_across_moves,
    test_samples_are_selected_repeated_and_reordered,
)
from test_channel_wise import model, test_is_two_passes_and_a_plain_average  # noqa: F401
from test_generate import (  # noqa: F401
    test_a_clip_in_the_second_turn,
    test_bfloat16,
    test_cached_decoding_equals_full_recompute,
    test_chunked_prefill_equals_one_shot,
    test_greedy_tokens_equal_the_reference,
    test_several_turns_on_one_cache,
)
from test_patch import (  # noqa: F401
    test_a_sample_without_both_modalities_is_vanilla,
    test_batched_equals_one_by_one,
    test_logits_equal_the_reference,
    test_low_precision_errs_no_more_than_plain_pytorch,
    test_right_padding,
    test_weights_and_soft_masking_equal_the_reference,
)

import fmd_ext
from fmd_ext import FMDConfig, ops
from fmd_ext.engine.reference import reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.ops import dispatch
from fmd_ext.ops.registration import operators
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, build_inputs


@pytest.fixture(autouse=True, params=["sdpa", "op"])
def _on_torch(request):
    """Prompts given at once by causal attention, as by default, and by the op."""
    dispatch.select_prefill(request.param)
    with dispatch.selected("torch"):
        yield request.param
    dispatch.select_prefill("auto")


def test_every_op_of_a_call_runs_there(thinker, monkeypatch, _on_torch):
    ran = set()

    def noting(name, op):
        def run(*arguments):
            ran.add(name)
            return op(*arguments)

        return run

    for name, op in operators().items():
        monkeypatch.setattr(op, "on_torch", noting(name, op.on_torch))
    handle = fmd_ext.patch(thinker, fork_layers=2, masking="zero")
    thinker.generate(**build_inputs([AUDIO_VIDEO]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    others = {"append_"} if _on_torch == "op" else {"append_", "branched_prefill"}
    assert ran == set(ops.__all__) - others  # rope_append_ appends
    assert handle.attention_runs_on == "torch: torch's path was chosen"


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_float64_equals_the_reference(masking, caplog):
    """A dtype that no kernel takes finds torch's path by itself, and says so once."""
    thinker = tiny_thinker(seed=0).double()
    inputs = build_inputs([AUDIO_VIDEO, TEXT_ONLY])
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    config = FMDConfig(fork_layers=2, masking=masking).resolve(FMDConfig(), 4)
    keep = inputs["attention_mask"].bool()
    want = reference_logits(thinker, config, **inputs)[keep]
    dispatch._warned.clear()
    with dispatch.selected("auto"), caplog.at_level(logging.WARNING):
        handle = fmd_ext.patch(thinker, config)
        # The model's own norms compute in float32.
        torch.testing.assert_close(thinker(**inputs).logits[keep], want, atol=1e-5, rtol=0)
        why = "the kernels for cpu take float32, bfloat16 and float16, not float64"
        assert handle.attention_runs_on == f"torch: {why}"
    assert sum(why in record.getMessage() for record in caplog.records) == 1


def test_the_decode_runner_steps_aside_and_says_so(thinker, caplog):
    inputs = build_inputs([AUDIO_VIDEO])
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            thinker.generate(**inputs, max_new_tokens=3, do_sample=False)
    reason = "attention runs by torch's own operations, which no graph can capture: torch's path was chosen"
    assert handle.runner.last == reason
    said = [record.getMessage() for record in caplog.records]
    assert said.count(f"fmd_ext: this generate call runs without the decode runner: {reason}") == 1
