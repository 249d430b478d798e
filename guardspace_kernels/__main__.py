"""``python -m guardspace_kernels``."""

import sys

from guardspace_kernels.cli import main

sys.exit(main())
