"""For `accelerate launch train/classify.py`: the same as `dia-diffusion classify`."""

import sys

from dia_diffusion_command import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
