"""``python -m qmoe_format.cli``: the same as ``qmoe``."""

import sys

from . import main

sys.exit(main())
