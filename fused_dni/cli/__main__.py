"""``python -m fused_dni.cli``."""

import sys

from fused_dni.cli import main

sys.exit(main())
