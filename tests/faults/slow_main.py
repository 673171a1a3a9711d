"""`slow_main.py SECONDS COMMAND ...`: runs the command with a pause of SECONDS after each file of a checkpoint."""

import sys

from dia_diffusion.cli.main import main
from tests.faults.harness import slow_checkpoints

if __name__ == "__main__":
    slow_checkpoints(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
