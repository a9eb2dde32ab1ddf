"""What cannot go with two rows per token, asked of vLLM itself: it is refused before a process starts."""

from __future__ import annotations

import pytest

from served import FRAMES, SETTINGS

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.config import FILE_KEY  # noqa: E402
from fmd_ext.lab.tiny import save_random_model  # noqa: E402
from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve import ARCHITECTURES  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_full_model(MODEL, tmp_path_factory.mktemp("full")), "Qwen2_5OmniForConditionalGeneration"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    thinker = save_random_model(tmp_path_factory.mktemp("thinker"), family="qwen3_omni")
    return write_full_model(thinker, tmp_path_factory.mktemp("full")), "Qwen3OmniMoeForConditionalGeneration"


def configuration(model, fork_layers, **options):
    """What vLLM makes of its flags before it starts anything."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder, architecture = model
    return EngineArgs(
        str(folder),
        max_model_len=1024,
        enforce_eager=True,
        mm_processor_kwargs={"videos_kwargs": {"size": FRAMES, "fps": 2.0}},
        hf_overrides={"architectures": [ARCHITECTURES[architecture][0]]},
        additional_config={FILE_KEY: {**SETTINGS, "fork_layers": fork_layers}},
        **options,
    ).create_engine_config()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_lora": True}, "LoRA's map from rows to adapters is made for one row per token"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "--speculative-config and fork-merge decoding .*: drafts were not tried with two branches",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config and .*: a store outside would mix up blocks of plain servers and of other settings",
        ),
        ({"enable_dbo": True}, "--enable-dbo and .*: micro-batches were not tried with two branches"),
        ({"runner": "pooling"}, "--runner pooling and .*: fork-merge decoding answers in text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_for_every_model(options, says, dense):
    with pytest.raises(ValueError, match=says):
        configuration(dense, 2, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_parallel_size": 2}, "--data-parallel-size with experts and .*: the exchange of tokens between ranks"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel and .*: the exchange of tokens between ranks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_for_models_with_experts(options, says, experts, dense):
    with pytest.raises(ValueError, match=says):
        configuration(experts, 2, **options)
    plain = configuration(experts, 0, **options)  # nothing forks: the flags are vLLM's business
    assert plain.parallel_config.data_parallel_size == options.get("data_parallel_size", 1)


def test_data_parallelism_without_experts_is_not_refused(dense):
    assert configuration(dense, 2, data_parallel_size=2).parallel_config.data_parallel_size == 2
