"""For `accelerate launch eval/fid.py`: the same as `dia-diffusion fid`."""

import sys

from dia_diffusion_command import main

if __name__ == "__main__":
    sys.exit(main(["fid", *sys.argv[1:]]))
