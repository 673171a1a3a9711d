"""`python -m dia_diffusion NAME` is `dia-diffusion NAME`."""

import sys

from dia_diffusion.cli.main import main

sys.exit(main())
