"""The same as `dia-diffusion curves`: a study, or curves of runs. It starts its own processes and needs no launcher."""

import sys

from dia_diffusion_command import main

if __name__ == "__main__":
    sys.exit(main(["curves", *sys.argv[1:]]))
