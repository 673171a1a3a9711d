"""Entry point of `dia-diffusion`, outside the package so that help and mistyped options don't wait for torch.

Python runs a package's `__init__` before any of its modules, and `import dia_diffusion` imports torch and diffusers,
which takes seconds. So `main` puts the package into sys.modules without running its `__init__`. Then the command's
options, which need no torch, are imported and checked, and `cli.main.import_package` runs the `__init__` before the
command. Where the package is imported already, as with `python -m dia_diffusion` or in a test, nothing is put off.
"""

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of sys.argv, and returns its exit code."""
    if "dia_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("dia_diffusion")
        assert spec is not None, "dia_diffusion is not installed"
        sys.modules["dia_diffusion"] = importlib.util.module_from_spec(spec)
    from dia_diffusion.cli.main import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main())
