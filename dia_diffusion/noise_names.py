"""What a noise process can be, by name; `dia_diffusion.noise` computes it."""

SCHEDULES = ("vp-continuous", "ddpm-linear", "cosine")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LOSS_WEIGHTINGS = ("uniform", "min-snr")
