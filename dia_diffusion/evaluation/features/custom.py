"""Features by MODULE:CLASS: a torch-fidelity extractor of the user's own."""

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from torch_fidelity import FeatureExtractorBase

from dia_diffusion.errors import InputError, one_line
from dia_diffusion.evaluation.features.extractor import state_hash
from dia_diffusion.io import sha256_of_file


def build_custom(name: str) -> tuple[FeatureExtractorBase, str]:
    """The extractor called MODULE:CLASS and a hash of its state dict and of the file that its class is written in.

    The module is imported from the working folder or from what is installed, which runs its code. The class is
    constructed as torch-fidelity does, (name, layers), with its default layers for "fid" and, where it has one, "isc".
    Raises InputError for what can't be imported or constructed, and for a class that is no extractor.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise InputError(f"features {name!r} lack a name; accepted: MODULE:CLASS")
    module = _import(module_name)
    extractor = getattr(module, class_name, None)
    if not (isinstance(extractor, type) and issubclass(extractor, FeatureExtractorBase)):
        what = f"{class_name} in {module_name} isn't one" if hasattr(module, class_name) else f"no {class_name} there"
        raise InputError(
            f"features {name}: {what}; a torch-fidelity extractor is needed, and {module_name} has: "
            f"{', '.join(_extractors(module)) or 'none'}"
        )
    try:
        built = extractor(name, _layers(extractor))
        return built, _hash(built)
    except Exception as error:  # a user's own code can raise anything
        raise InputError(
            f"features {name} can't be constructed as {class_name}(name, layers) ({_told(error)})"
        ) from error


def _hash(extractor: FeatureExtractorBase) -> str:
    """sha256 over tensors and code: with few or no tensors it is the code that makes the features what they are."""
    parts = state_hash(extractor.state_dict()), sha256_of_file(inspect.getfile(type(extractor)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _import(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"module {name} can't be imported ({_told(error)})") from error
        raise InputError(f"no module {name!r} in {here} or installed; features are named MODULE:CLASS") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"module {name} can't be imported ({_told(error)})") from error


def _layers(extractor: type[FeatureExtractorBase]) -> list[str]:
    """The default layers of the metrics, without a second one where there is none for "isc"."""
    layers = [extractor.get_default_feature_layer_for_metric("fid")]
    try:
        logits = extractor.get_default_feature_layer_for_metric("isc")
    except Exception:  # by a KeyError, an assertion, NotImplementedError: each extractor says no in its own way
        logits = None
    return layers if logits is None or logits in layers else [*layers, logits]


def _extractors(module: ModuleType) -> list[str]:
    own = (value for value in vars(module).values() if isinstance(value, type))
    return [
        value.__name__ for value in own if issubclass(value, FeatureExtractorBase) and value is not FeatureExtractorBase
    ]


def _told(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")
