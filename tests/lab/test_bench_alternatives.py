"""What the attention ops are measured against on a GPU: the same outputs, as far as it runs on the CPU."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fmd_ext.lab.bench import report
from fmd_ext.lab.bench.alternatives import (
    BACKENDS,
    AttentionWork,
    Group,
    _flash_attn,
    _flashinfer,
    _other_library,
    _sdpa,
    alternatives,
    flex_attention,
)
from fmd_ext.lab.bench.attention_cases import eager_attention, exact_attention, groups_of, least_work
from fmd_ext.lab.bench.cases import Candidate, Case, run_case
from fmd_ext.lab.bench.checking import Reference
from fmd_ext.lab.bench.page import _run
from fmd_ext.lab.bench.plans import attention_plans
from fmd_ext.lab.bench.roofline import Work, add_limits, measure_peaks
from fmd_ext.lab.bench.timing import Step
from fmd_ext.lab.bench.workload import QUICK_PROMPT, SIZES, Workload

CPU = torch.device("cpu")
PLANS = {f"{plan.op}/{plan.variant}": plan for plan in attention_plans(Workload(SIZES["tiny"], QUICK_PROMPT))}


@pytest.fixture(params=PLANS)
def work(request):
    plan = PLANS[request.param]
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(plan.num_rows, 7, 64, generator=draw)
    k, v = torch.randn(2, 1, plan.num_slots, 64, generator=draw)
    groups = groups_of(plan.step, CPU)
    exact = exact_attention(q, k, v, groups, 0.125)
    return AttentionWork(q, k, v, groups, 0.125, Reference([exact], 1e-5))


def check(candidate):
    assert candidate.optional
    return candidate.check("case", candidate.step.run())


def test_flash_backend(work):
    check(_sdpa(work, "flash", BACKENDS["flash"]))


def test_flex_attention(work):
    check(flex_attention(work, compiled=False))


def grouped(q, k, v, causal, scale):
    """[rows or keys, heads, head_dim], as flash-attn and FlashInfer take them."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def test_other_libraries_get_what_they_take(work, monkeypatch):
    """Neither runs on the CPU: stand-ins with their signatures do."""
    flash_attn, flashinfer = types.ModuleType("flash_attn"), types.ModuleType("flashinfer")
    flash_attn.flash_attn_func = lambda q, k, v, causal, softmax_scale: grouped(
        q[0], k[0], v[0], causal, softmax_scale
    )[None]
    flashinfer.single_prefill_with_kv_cache = lambda q, k, v, causal, sm_scale: grouped(q, k, v, causal, sm_scale)
    flashinfer.single_decode_with_kv_cache = lambda q, k, v, sm_scale: grouped(q[None], k, v, False, sm_scale)[0]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    for load in (_flash_attn, _flashinfer):
        check(_other_library(work, "library", load))


def test_on_the_cpu_there_is_sdpa_alone(work):
    assert [(candidate.name, candidate.optional) for candidate in alternatives(work)] == [("SDPA per branch", False)]


def test_what_is_not_there_is_named_and_what_is_wrong_still_fails():
    def missing():
        raise ImportError("No module named 'flashinfer'")

    reference = Reference([torch.ones(3)], 0.0)
    right = Candidate("right", Step(lambda: torch.ones(3)), lambda out: [out], reference)
    absent = Candidate("absent", Step(missing), lambda out: [out], reference, optional=True)
    measured = run_case(Case("op", "case", {}, [right, absent]), CPU, 2, 0.0)
    assert [candidate["name"] for candidate in measured["candidates"]] == ["right"]
    assert report.absent([measured]) == {"absent": "ImportError: No module named 'flashinfer'"}
    with pytest.raises(ImportError):
        run_case(Case("op", "case", {}, [right, dataclasses.replace(absent, optional=False)]), CPU, 2, 0.0)
    wrong = Candidate("wrong", Step(lambda: torch.zeros(3)), lambda out: [out], reference, optional=True)
    assert "wrong output" in run_case(Case("op", "case", {}, [right, wrong]), CPU, 2, 0.0)["error"]


def test_least_work_by_hand():
    """Two branches behind a prefix: in prefill the prefix is a group, in decode it is read once for both."""
    q, k = torch.zeros(9, 2, 8), torch.zeros(1, 20, 8)
    slots = torch.arange(20)
    prefix = Group(torch.arange(3), slots[:3], 0)
    first = Group(torch.tensor([3, 4]), torch.cat([slots[:3], slots[5:7]]), 3)
    second = Group(torch.tensor([5, 6, 7, 8]), torch.cat([slots[:3], slots[10:14]]), 3)
    assert eager_attention(q, k, k, [prefix, first, second], [None] * 3, 1.0).shape == q.shape
    work = least_work(q, k, [prefix, first, second])
    assert work.bytes == 4 * (2 * 9 * 2 * 8 + 2 * (3 + 2 + 4) * 8)
    assert work.flops == 4 * ((1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)) * 2 * 8
    decode = [Group(torch.tensor([row]), group.slots, 3) for row, group in enumerate((first, second))]
    assert least_work(q[:2], k, decode).bytes == 4 * (2 * 2 * 2 * 8 + 2 * (3 + 2 + 4) * 8)


def test_the_slower_of_memory_and_arithmetic_binds():
    peaks = {"copy_bytes_per_s": 100.0, "matrix_flops_per_s": 1000.0}
    assert Work(200, 100).seconds(peaks) == 2.0 and Work(200, 5000).seconds(peaks) == 5.0
    case = {"case": "op/case", "candidates": [{"seconds": {"median": 4.0}}]}
    add_limits(case, Work(200), peaks)
    assert case["seconds_at_peak"] == 2.0 and case["candidates"][0]["of_peak"] == 0.5
    untouched = {"case": "op/case", "error": "wrong"}
    add_limits(untouched, Work(200), peaks)
    add_limits(untouched, None, peaks)
    assert set(untouched) == {"case", "error"}
    measured = measure_peaks(CPU, torch.float32, quick=True)
    assert all(1e6 < value < 1e16 for value in measured.values())


def test_the_page_names_what_is_absent():
    machine = {"cpu": "c", "cores": 1, "threads": 1, "isa": "i", "torch_isa": "t", "gpu": "g"}
    workload = Workload(SIZES["tiny"], QUICK_PROMPT).describe()
    run = {
        "command": "bench", "machine": machine, "versions": {}, "revision": {"commit": "0", "dirty": False},
        "date": "d", "device": "cuda", "dtype": "bfloat16", "workload": workload,
        "peaks": {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 7e14},
        "cases": [{"case": "op/case", "absent": {"FlashInfer per branch": "ImportError: none"}}],
    }  # fmt: skip
    text = "\n".join(_run(run))
    assert "* FlashInfer per branch: `ImportError: none`" in text
    assert "copy 4000 GB/s, matrix product 700 TFLOP/s (measured)" in text
