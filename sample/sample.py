"""For `accelerate launch sample/sample.py`: the same as `dia-diffusion sample`."""

import sys

from dia_diffusion_command import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
