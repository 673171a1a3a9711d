"""The features there are, by name; `dia_diffusion.evaluation.features` builds them."""

PACKAGED = ("digits", "cifar10")
"""This project's own, their weights packaged."""
ACCEPTED = f"{', '.join(PACKAGED)}, inception, or MODULE:CLASS, a torch-fidelity extractor of your own"
