"""What a safetensors file says of its tensors, by its header alone."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from dia_diffusion.errors import InputError


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """tensor name -> shape. Raises InputError as `read_header`."""
    return {name: shape for name, (shape, _) in read_header(file).items()}


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """tensor name -> shape and type, as safetensors calls it: F32, I64, C64.

    Raises:
        InputError: a file that is cut short or none.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut short or not safetensors: {error}") from None
