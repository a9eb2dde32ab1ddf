"""The in-tree build backend: setuptools' own hooks, and what a build needs over what pyproject.toml names.

What is missing for a build is said before the installer downloads anything. Only where no torch is installed does the
backend ask for one.
"""

from __future__ import annotations

from setuptools import build_meta as _setuptools_hooks
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

import fmd_build_tools as tools


def get_requires_for_build_wheel(config_settings=None):
    ours = tools.build_requirements()  # first: what is missing is then the only thing that is printed
    return _setuptools_hooks.get_requires_for_build_wheel(config_settings) + ours


def get_requires_for_build_editable(config_settings=None):
    ours = tools.build_requirements()  # first: what is missing is then the only thing that is printed
    return _setuptools_hooks.get_requires_for_build_editable(config_settings) + ours
