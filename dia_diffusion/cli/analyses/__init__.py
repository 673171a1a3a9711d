"""The analyses of `dia-diffusion analyze`: each a function of its arguments, named in cli/analyze.py."""
