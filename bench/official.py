"""The official U-ViT (github.com/baofff/U-ViT) from a checkout given by path: network, training step and sampler.

Nothing of it is in this project; its modules are imported from the checkout, and need absl-py and tqdm.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.errors import InputError

# configs/cifar10_uvit_small.py there: the network's and the optimizer's numbers.
NETWORK = {
    "img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 12, "num_heads": 8, "mlp_ratio": 4,
    "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1,
}  # fmt: skip
OPTIMIZER = {"lr": 2e-4, "weight_decay": 0.03, "betas": (0.99, 0.999)}
WARMUP_STEPS, EMA_RATE = 2500, 0.9999


class Official:
    """The checkout's modules.

    Raises:
        InputError: no such checkout, or something that its modules need is missing.
    """

    def __init__(self, checkout: Path):
        if not (checkout / "libs" / "uvit.py").is_file() or not (checkout / "sde.py").is_file():
            raise InputError(f"--uvit-repo {checkout} has no libs/uvit.py and sde.py; accepted: a checkout of U-ViT")
        sys.path.insert(0, str(checkout))
        try:
            with redirect_stdout(StringIO()):
                self.uvit, self.sde, self.utils = map(importlib.import_module, ("libs.uvit", "sde", "utils"))
        except ImportError as error:
            raise InputError(f"--uvit-repo {checkout} needs {error.name}, which is not installed") from error
        finally:
            sys.path.remove(str(checkout))

    def network(self) -> nn.Module:
        """U-ViT-S/2 for CIFAR-10."""
        return self.uvit.UViT(**NETWORK)

    def training_step(self, images: Tensor, precision: str) -> Callable[[], Any]:
        """One step of its train.py on images (B, 3, 32, 32) in [-1, 1], its metrics, loader and logs left out."""
        accelerator = Accelerator(mixed_precision="no" if precision == "none" else precision)
        network, average = self.network(), self.network()
        average.load_state_dict(network.state_dict())
        optimizer = self.utils.get_optimizer(network.parameters(), "adamw", **OPTIMIZER)
        scheduler = self.utils.get_lr_scheduler(optimizer, "customized", warmup_steps=WARMUP_STEPS)
        network, average, optimizer = accelerator.prepare(network, average, optimizer)
        score_model = self.sde.ScoreModel(network, pred="noise_pred", sde=self.sde.VPSDE())
        network.train()
        images = images.to(accelerator.device)

        def step() -> None:
            optimizer.zero_grad()
            loss = self.sde.LSimple(score_model, images, pred="noise_pred")
            accelerator.backward(loss.mean())
            optimizer.step()
            scheduler.step()
            self.utils.ema(average, network, EMA_RATE)

        return step

    def sampler(self, weights: dict[str, Tensor] | None, precision: str, device: torch.device) -> Callable[..., Tensor]:
        """Its Euler-Maruyama sampler: called with the first noise (B, 3, 32, 32) and the number of steps."""
        accelerator = Accelerator(mixed_precision="no" if precision == "none" else precision)
        network = self.network()
        if weights is not None:
            network.load_state_dict(weights)
        network = accelerator.prepare(network.eval().to(device))
        score_model = self.sde.ScoreModel(network, pred="noise_pred", sde=self.sde.VPSDE())

        def sample(noise: Tensor, steps: int) -> Tensor:
            with redirect_stdout(StringIO()):
                return self.sde.euler_maruyama(self.sde.ReverseSDE(score_model), noise, steps)

        return sample
