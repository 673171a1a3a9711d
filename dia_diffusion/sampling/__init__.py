"""Sampling images from pipelines: one noise stream per image seed, named samplers over diffusers' schedulers."""
