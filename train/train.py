"""For `accelerate launch train/train.py`: the same as `dia-diffusion train`."""

import sys

from dia_diffusion_command import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
