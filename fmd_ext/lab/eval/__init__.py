"""Evaluation: benchmarks, methods, predictions that survive a crash, statistics and reports."""

from __future__ import annotations
