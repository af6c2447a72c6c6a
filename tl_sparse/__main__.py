"""`python -m tl_sparse`, which is also what `accelerate launch -m tl_sparse` runs."""

import sys

from tl_sparse.cli import main

sys.exit(main())
