"""Images from pipelines: one noise stream an image seed, named samplers over diffusers' schedulers."""
