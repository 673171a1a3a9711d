"""The package's public names."""

import dia_diffusion


def test_every_public_name_is_there() -> None:
    for name in dia_diffusion.__all__:
        assert getattr(dia_diffusion, name).__name__ == name
