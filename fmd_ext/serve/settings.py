"""The settings of a served model, and what vLLM must not be asked to do with two rows per token.

They come by vLLM's own ``--additional-config``, under the key of the files that ``fmd-ext calibrate`` writes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmd_ext.config import AUTO, FILE_KEY, FMDConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class CheckedConfig:
    """What vLLM calls for our architectures while it makes its configuration, before it starts a process."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Checks settings and options; leaves the settings resolved in ``additional_config``.

        Resolved, because they are then part of the key under which vLLM keeps compiled code.

        Raises:
            OSError, TypeError, ValueError: as `served_settings`.
            ValueError: an option of vLLM that does not go together with two rows per token.
        """
        settings = served_settings(vllm_config)
        if settings.fork_layers:
            _refuse(vllm_config, settings)
            _switch_off(vllm_config)
        vllm_config.additional_config = {**_additional(vllm_config), FILE_KEY: dataclasses.asdict(settings)}

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing of the model's own configuration changes."""


def served_settings(vllm_config: VllmConfig) -> FMDConfig:
    """The settings for this server, all fields filled.

    ``additional_config`` holds under ``"fork_merge_decoding"`` the settings, or the path of a file with them; without
    it they are the defaults.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: as `FMDConfig`; a setting that vLLM's paged cache has no room for.
    """
    given = _additional(vllm_config).get(FILE_KEY, {})
    if isinstance(given, str):
        asked = FMDConfig.from_file(given)
    elif isinstance(given, Mapping):
        asked = FMDConfig().replace(**given)
    else:
        raise TypeError(f"{FILE_KEY} in --additional-config must be settings or the path of a file, got {given!r}")
    settings = asked.resolve(FMDConfig(), vllm_config.model_config.hf_text_config.num_hidden_layers)
    refuse_unservable(settings)
    return settings


def refuse_unservable(settings: FMDConfig) -> None:
    """Raises ValueError for a setting that the library takes and a server cannot; those not given yet are no fault."""
    for name in ("fork_layers", "alpha", "text_weight"):
        if getattr(settings, name) == AUTO or (name == "text_weight" and settings.asks):
            raise ValueError(
                f"{name}={getattr(settings, name)!r} is chosen per prompt and cannot be served; give a number"
            )
    if settings.masking not in (None, "zero"):
        raise ValueError(
            f"masking={settings.masking!r} cannot be served: a block of vLLM's cache holds a branch's whole sequence, "
            "masked positions included; accepted is 'zero'"
        )


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    given = vllm_config.additional_config
    return dict(given) if isinstance(given, Mapping) else {}


def _refuse(vllm_config: VllmConfig, settings: FMDConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    moe = bool(getattr(text, "num_experts", 0))
    first_rank_layers = model.get_layers_start_end_indices(parallel)[1] if parallel.pipeline_parallel_size > 1 else None
    one_row = "is made for one row per token, and fork layers have two"
    reasons = {
        "--enable-lora": vllm_config.lora_config is not None and f"LoRA's map from rows to adapters {one_row}",
        "--speculative-config": vllm_config.speculative_config is not None
        and "drafts were not tried with two branches",
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None
        and "a store outside would mix up blocks of plain servers and of other settings",
        "--data-parallel-size with experts": moe
        and parallel.data_parallel_size > 1
        and f"the exchange of tokens between ranks {one_row}",
        "--enable-expert-parallel": parallel.enable_expert_parallel
        and f"the exchange of tokens between ranks {one_row}",
        "--enable-dbo": getattr(parallel, "use_ubatching", False) and "micro-batches were not tried with two branches",
        "context parallelism": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1
        and "it was not tried with two branches",
        "dual chunk attention": getattr(text, "dual_chunk_attention_config", None)
        and "it was not tried with two branches",
        "--runner pooling": model.runner_type != "generate" and "fork-merge decoding answers in text",
        "--pipeline-parallel-size": first_rank_layers is not None
        and first_rank_layers < settings.fork_layers
        and f"the first rank has {first_rank_layers} layers, and all {settings.fork_layers} fork layers must be on it",
    }
    for option, reason in reasons.items():
        if reason:
            raise ValueError(f"{option} and fork-merge decoding (fork_layers={settings.fork_layers}): {reason}")


def _switch_off(vllm_config: VllmConfig) -> None:
    """Passes of vLLM's compiler that size a buffer, or cut the rows, for one row per token."""
    passes = vllm_config.compilation_config.pass_config
    for name in ("fuse_allreduce_rms", "enable_sp", "fuse_gemm_comms"):
        if getattr(passes, name, None):
            logger.warning("vLLM's pass %s is switched off: it is made for one row per token", name)
        if hasattr(passes, name):
            setattr(passes, name, False)
