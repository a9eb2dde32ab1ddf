"""``fmd-ext serve``: the ``vllm serve`` command for a model with fork-merge decoding, printed and then run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import transformers

from fmd_ext.cli.answer import config_from
from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.cli.models import is_path, lab_module
from fmd_ext.config import FILE_KEY, FMDConfig
from fmd_ext.inputs.chat import SMALLEST_FRAME
from fmd_ext.serve import ARCHITECTURES, environment
from fmd_ext.serve.folder import is_thinker, write_full_model
from fmd_ext.serve.settings import refuse_unservable

BUILT_IN = "built-in"
BUILT_IN_CACHE = 256 * 2**20  # bytes, of more than 100,000 tokens; by itself vLLM takes most of a machine's memory
# vLLM's own flags that this command writes; given twice, the last one would win in silence.
_OURS = ("--model", "--hf-overrides", "--additional-config")


def run(args: argparse.Namespace) -> int:
    """Replaces this process with vLLM's server."""
    missing = environment.what_is_missing()
    if missing is not None:
        raise UserError(missing)
    command = [*environment.server_command(), *serve_arguments(args.model, config_from(args), args.vllm)]
    added = environment.process_environment()
    print(shlex.join([*(f"{name}={value}" for name, value in added.items()), *command]), flush=True)
    if args.print_only:
        return 0
    os.execvpe(command[0], command, {**os.environ, **added})


def serve_arguments(source: str, config: FMDConfig, more: list[str]) -> list[str]:
    """The arguments of ``vllm serve`` for ``source``: a folder, a hub name, or ``"built-in"``.

    Args:
        config: settings that were given; what is not given takes its default when vLLM starts.
        more: flags for vLLM.

    Raises:
        UserError: no such folder, a model that is not supported, a setting that cannot be served, or a flag in ``more``
            that this command writes.
    """
    more = [flag for flag in more if flag != "--"]
    for flag in more:
        if flag.partition("=")[0] in _OURS:
            raise UserError(f"{flag.partition('=')[0]} is written by this command; run the printed one with your own")
    flags: dict[str, Any] = {}
    if source == BUILT_IN:
        trained = lab_module("trained", "the built-in model")
        source, own = str(trained.MODEL), FMDConfig.from_file(trained.SETTINGS)
        given = {name: value for name, value in vars(config).items() if value is not None}
        config = own.replace(**given)
        flags["--served-model-name"] = "fmd-ext"
        flags["--kv-cache-memory-bytes"] = str(BUILT_IN_CACHE)
    if is_path(source) and not Path(source).is_dir():
        raise UserError(f"model {source}: there is no such folder")
    if is_thinker(source):
        source = str(_as_full_model(Path(source)))
    with blaming_input(OSError, ValueError, prefix=f"model {source}: "):
        loaded, _ = transformers.PretrainedConfig.get_config_dict(source)
    architecture = next(iter(loaded.get("architectures") or ()), None)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model {source} is a {architecture}; fork-merge decoding serves {' and '.join(sorted(ARCHITECTURES))}"
        )
    # vLLM checks them again, behind its imports and among its messages.
    layers = loaded.get("thinker_config", {}).get("text_config", {}).get("num_hidden_layers")
    with blaming_input(ValueError):
        refuse_unservable(config)
        if layers is not None:
            config.resolve(FMDConfig(), layers)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    flags["--hf-overrides"] = {"architectures": [ARCHITECTURES[architecture][0]]}
    flags["--additional-config"] = {FILE_KEY: settings}
    flags.update(_frame_size(Path(source)))
    written = []
    for flag, value in flags.items():
        if flag not in more:
            written += [flag, value if isinstance(value, str) else json.dumps(value)]
    return [source, *written, *more]


def _as_full_model(thinker: Path) -> Path:
    """A copy that vLLM knows, in the user's cache; made again when a file of the thinker has changed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmd_ext"
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(thinker.iterdir())]
    key = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    target = cache / f"{thinker.resolve().name}-{key}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # so that half a copy is never taken for one
            write_full_model(thinker, Path(folder) / "model").rename(target)
    return target


def _frame_size(folder: Path) -> dict[str, Any]:
    """The frame size of a processor made for small frames, which its class would overrule (see `inputs.chat`)."""
    try:
        size = json.loads((folder / "processor_config.json").read_text())["video_processor"]["size"]
        small = size["longest_edge"] < SMALLEST_FRAME
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"--mm-processor-kwargs": {"videos_kwargs": {"size": size}}} if small else {}
