"""What is known of transformers: the supported range, and the two names of the cache."""

from __future__ import annotations

import importlib.metadata
import inspect
import re

import pytest
import torch
from transformers import DynamicCache

import fmd_ext
from fmd_ext import compat
from omni_inputs import VIDEO_AUDIO, build_inputs
from paths import ROOT

NAMES = ["past_key_values", "cache"] if compat.cache_name() == "cache" else ["past_key_values"]


class TestVersions:
    def test_the_range_is_the_one_that_pip_is_told(self):
        (major, minor), oldest = compat.NEWEST, ".".join(map(str, compat.OLDEST))
        assert f'"transformers>={oldest},<{major}.{minor + 1}"' in (ROOT / "pyproject.toml").read_text()

    def test_the_pin_is_the_newest(self):
        pins = re.findall(
            r"(?m)^transformers==(\d+)\.(\d+)\.\d+; python_version >=", (ROOT / "constraints.txt").read_text()
        )
        assert [tuple(map(int, pin)) for pin in pins] == [compat.NEWEST]

    @pytest.mark.parametrize("installed", ["4.57.1", "5.16.9"])
    def test_an_older_one_is_refused(self, monkeypatch, installed):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
        with pytest.raises(ImportError, match=rf"5.17 to 5.24; {installed} is installed: upgrade"):
            compat.check_transformers()

    def test_none_is_refused(self, monkeypatch):
        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", missing)
        with pytest.raises(ImportError, match="transformers 5.17 to 5.24; none is installed"):
            compat.check_transformers()

    def test_a_newer_one_is_said_once(self, monkeypatch, caplog):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.99.0.dev0")
        compat.warn_about_transformers.cache_clear()
        for _ in range(2):
            compat.warn_about_transformers()
        compat.warn_about_transformers.cache_clear()
        assert [r.getMessage() for r in caplog.records] == [
            "fmd_ext: fmd_ext supports transformers 5.17 to 5.24; "
            "5.99.0.dev0 is installed, which its tests did not run on"
        ]

    def test_all_within_are_accepted(self, monkeypatch):
        for installed in ("5.17.0", "5.20.2", "5.24.3"):
            monkeypatch.setattr(importlib.metadata, "version", lambda name, installed=installed: installed)
            assert compat.check_transformers() == ""


class TestCacheNames:
    @pytest.mark.parametrize("given", NAMES)
    def test_a_function_gets_its_own_name(self, given):
        cache = DynamicCache()
        for wanted in NAMES:
            assert compat.name_cache({given: cache, "x": 1}, wanted) == {wanted: cache, "x": 1}

    def test_two_caches_are_refused(self):
        if len(NAMES) == 1:
            assert compat.name_cache({"cache": 1, "past_key_values": 2}, NAMES[0]) == {"cache": 1, "past_key_values": 2}
            return
        with pytest.raises(ValueError, match="two caches are given, as past_key_values and as cache; give one"):
            compat.name_cache({name: DynamicCache() for name in NAMES}, "cache")
        one = DynamicCache()
        assert compat.name_cache({"cache": one, "past_key_values": one}, "cache") == {"cache": one}
        assert compat.name_cache({"cache": None, "past_key_values": one}, "cache") == {"cache": one}

    def test_the_name_in_a_signature(self):
        def new(self, cache=None): ...
        def old(self, past_key_values=None): ...
        def any_name(self, **kwargs): ...

        found = [compat.cache_argument(inspect.signature(f)) for f in (new, old, any_name)]
        assert found == ["cache", "past_key_values", compat.cache_name()]

    @pytest.mark.parametrize("given", NAMES)
    def test_our_ports_take_either(self, given):
        @compat.takes_cache
        def forward(self, x, cache=None, **kwargs):
            return x, cache, kwargs

        cache = DynamicCache()
        assert forward(None, 1, **{given: cache}) == (1, cache, {})
        assert compat.cache_name() in inspect.signature(forward).parameters

    @pytest.mark.parametrize("given", NAMES)
    def test_a_patched_model_takes_either(self, thinker, given):
        """Two turns on a cache of the user's equal one call with all of it."""
        inputs = build_inputs([VIDEO_AUDIO])
        fmd_ext.patch(thinker, fork_layers=2)
        more = torch.tensor([[41, 57, 33]])
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        ids = torch.cat([inputs["input_ids"], more], 1)
        whole = thinker(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
        cache = DynamicCache()
        first = thinker(**inputs, use_cache=True, **{given: cache})
        assert compat.cache_of(first) is cache and cache.get_seq_length() == ids.shape[1] - 3
        second = thinker(input_ids=more, **{given: cache})
        torch.testing.assert_close(second.logits[:, -1], whole, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("runner", [False, True])
    @pytest.mark.parametrize("given", NAMES)
    def test_generate_takes_either(self, thinker, given, runner):
        inputs = build_inputs([VIDEO_AUDIO])
        fmd_ext.patch(thinker, fork_layers=2, runner=runner)
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        expected = thinker.generate(**inputs, **settings)
        cache = DynamicCache()
        out = thinker.generate(**inputs, **settings, return_dict_in_generate=True, **{given: cache})
        assert torch.equal(out.sequences, expected) and compat.cache_of(out) is cache
        assert cache.get_seq_length() == expected.shape[1] - 1
