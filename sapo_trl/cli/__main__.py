"""`python -m sapo_trl.cli` runs the `sapo-trl` command without its script."""

import sys

from . import main


sys.exit(main())
