"""``python -m fmd_ext`` is ``fmd-ext``, also where no script of that name is on the PATH."""

from __future__ import annotations

import sys

from fmd_ext.cli import main

sys.exit(main())
