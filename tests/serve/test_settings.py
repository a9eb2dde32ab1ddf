"""What is asked of a server, checked before anything is loaded; vLLM is not needed for it."""

from __future__ import annotations

import types

import pytest

from fmd_ext.config import FILE_KEY, FMDConfig
from fmd_ext.serve.settings import CheckedConfig, served_settings

LAYERS = 8


def vllm_config(settings=None, *, experts=0, first_rank=LAYERS, **changes):
    """As much of vLLM's configuration as is read."""
    text = types.SimpleNamespace(num_hidden_layers=LAYERS, num_experts=experts)
    parallel = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "use_ubatching": False,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    parts = {"lora_config": None, "speculative_config": None, "kv_transfer_config": None, "runner_type": "generate"}
    parts.update({name: value for name, value in changes.items() if name not in parallel})
    parallel.update({name: value for name, value in changes.items() if name in parallel})
    runner = parts.pop("runner_type")
    model = types.SimpleNamespace(
        hf_text_config=text, runner_type=runner, get_layers_start_end_indices=lambda parallel: (0, first_rank)
    )
    passes = types.SimpleNamespace(fuse_allreduce_rms=True, enable_sp=None, fuse_gemm_comms=None)
    return types.SimpleNamespace(
        model_config=model,
        parallel_config=types.SimpleNamespace(**parallel),
        compilation_config=types.SimpleNamespace(pass_config=passes),
        additional_config={} if settings is None else {FILE_KEY: settings, "other": 1},
        **parts,
    )


def test_nothing_given_is_the_default():
    assert served_settings(vllm_config()) == FMDConfig(2, "zero", 0.0, 0.8, 0.5)


def test_settings_may_lie_in_the_file_of_calibrate(tmp_path):
    FMDConfig(fork_layers=3, alpha={"visual": 0.9, "audio": 0.7}).to_file(tmp_path / "fmd.json", measured=[1, 2])
    found = served_settings(vllm_config(str(tmp_path / "fmd.json")))
    assert found == FMDConfig(3, "zero", 0.0, {"visual": 0.9, "audio": 0.7}, 0.5)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"fork_layers": 9}, ValueError, "fork_layers=9 is out of range: the decoder has 8 layers"),
        ({"alpha": 1.5}, ValueError, "alpha must be in"),
        ({"alfa": 0.5}, TypeError, "unknown FMD setting 'alfa'"),
        ({"alpha": "auto"}, ValueError, "alpha='auto' is chosen per prompt and cannot be served"),
        ({"text_weight": "auto"}, ValueError, "text_weight='auto' is chosen per prompt and cannot be served"),
        ({"text_weight": {"visual": 1.0, "audio": 0.0}}, ValueError, "is chosen per prompt and cannot be served"),
        ({"fork_layers": "auto"}, ValueError, "fork_layers='auto' is chosen per prompt and cannot be served"),
        ({"masking": "attention"}, ValueError, "masking='attention' cannot be served"),
        ([1], TypeError, "must be settings or the path of a file"),
        ("nowhere/fmd.json", OSError, "nowhere/fmd.json"),
    ],
)
def test_wrong_settings_are_named(settings, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")):
        CheckedConfig.verify_and_update_config(vllm_config(settings))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"data_parallel_size": 2, "experts": 8}, "--data-parallel-size with experts"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"runner_type": "pooling"}, "--runner pooling"),
        ({"pipeline_parallel_size": 4, "first_rank": 2}, "the first rank has 2 layers, and all 3 fork layers"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(changes, says):
    with pytest.raises(ValueError, match=says):
        CheckedConfig.verify_and_update_config(vllm_config({"fork_layers": 3}, **changes))
    CheckedConfig.verify_and_update_config(vllm_config({"fork_layers": 0}, **changes))  # a plain model: all goes


def test_what_goes_together_is_not_refused():
    for changes in ({"data_parallel_size": 2}, {"experts": 8}, {"pipeline_parallel_size": 2, "first_rank": 4}):
        CheckedConfig.verify_and_update_config(vllm_config({"fork_layers": 3}, **changes))


def test_settings_are_left_resolved_because_compiled_code_is_kept_by_them(tmp_path):
    FMDConfig(fork_layers=3).to_file(tmp_path / "fmd.json")
    config = vllm_config(str(tmp_path / "fmd.json"))
    CheckedConfig.verify_and_update_config(config)
    resolved = {"fork_layers": 3, "masking": "zero", "mask_scale": 0.0, "alpha": 0.8, "text_weight": 0.5}
    assert config.additional_config == {FILE_KEY: resolved, "other": 1}
    assert served_settings(config) == FMDConfig(**resolved)


def test_a_pass_that_sizes_buffers_for_one_row_per_token_is_switched_off(caplog):
    config = vllm_config({"fork_layers": 3})
    CheckedConfig.verify_and_update_config(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    assert "fuse_allreduce_rms is switched off" in caplog.text and "enable_sp" not in caplog.text
