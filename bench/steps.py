"""Training steps by name, each run by its own project's code, of networks of about U-ViT-S/2's size.

The official U-ViT (github.com/baofff/U-ViT) is imported from a checkout given by path, and needs absl-py and tqdm.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import override, read_experiment
from dia_diffusion.training.trainer import Trainer

# The network's and the optimizer's settings in that checkout's configs/cifar10_uvit_small.py.
NETWORK = {
    "img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 12, "num_heads": 8, "mlp_ratio": 4,
    "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1,
}  # fmt: skip
OPTIMIZER = {"lr": 2e-4, "weight_decay": 0.03, "betas": (0.99, 0.999)}
WARMUP_STEPS, EMA_RATE = 2500, 0.9999


class Official:
    """The checkout's modules.

    Raises:
        InputError: no such checkout, or a package that its modules need is missing.
    """

    def __init__(self, checkout: Path):
        if not (checkout / "libs" / "uvit.py").is_file() or not (checkout / "sde.py").is_file():
            raise InputError(f"`--uvit-repo` must be a checkout of U-ViT, with libs/uvit.py and sde.py, got {checkout}")
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
        """One step of its train.py on images (B, 3, 32, 32) in [-1, 1], without its metrics, loader and logs."""
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

    def sampler(self, precision: str, device: torch.device) -> Callable[..., Tensor]:
        """Its Euler-Maruyama sampler, called with the initial noise (B, 3, 32, 32) and the number of steps."""
        accelerator = Accelerator(mixed_precision="no" if precision == "none" else precision)
        network = accelerator.prepare(self.network().eval().to(device))
        score_model = self.sde.ScoreModel(network, pred="noise_pred", sde=self.sde.VPSDE())

        def sample(noise: Tensor, steps: int) -> Tensor:
            with redirect_stdout(StringIO()):
                return self.sde.euler_maruyama(self.sde.ReverseSDE(score_model), noise, steps)

        return sample


OURS = "dia-diffusion"
OFFICIAL = "official U-ViT"


@dataclass(frozen=True)
class Setting:
    """The settings of a training step."""

    batch_size: int
    precision: str
    """bf16 or none."""
    work: Path
    """A folder for runs and random images."""
    official: Official | None = None
    recipe: str = "cifar10_uvit_s2"
    """Our recipe; peers exist only for U-ViT-S/2's."""


Step = Callable[[], object]


COMPILED = ", compiled"
GRAPHS = ", CUDA graphs"


def names(setting: Setting, with_compiled: bool) -> list[str]:
    """The steps that can run here; ours without a unit comes first."""
    ours = [OURS, f"{OURS}, DIA-LSTM", f"{OURS}, Light"]
    if with_compiled:
        ways = [COMPILED, *([GRAPHS] if torch.cuda.is_available() else [])]
        ours += [f"{OURS}{unit}{way}" for way in ways for unit in ("", ", DIA-LSTM")]
    if setting.recipe != Setting.recipe:
        return ours
    theirs = ["diffusers DiT", "diffusers UNet2D"]
    return [*ours, *([OFFICIAL] if setting.official else []), *theirs]


def eager(name: str) -> str:
    """The name of the same step without compilation."""
    return name.removesuffix(COMPILED).removesuffix(GRAPHS)


def build_step(name: str, setting: Setting) -> Step:
    """A training step by name. Peers get normalized images that are already in memory; ours reads its own."""
    if name.startswith(OURS):
        return own_step(experiment_of(name, setting))
    if name == OFFICIAL:
        assert setting.official is not None
        return setting.official.training_step(_images(setting.batch_size), setting.precision)
    return _diffusers_step({"diffusers DiT": _dit, "diffusers UNet2D": _unet}[name](), setting)


def experiment_of(name: str, setting: Setting) -> Experiment:
    """The recipe for one of our steps, on random images."""
    attention = "dia-lstm" if "DIA-LSTM" in name else "dia-lstm-light" if "Light" in name else "none"
    experiment = read_experiment(
        setting.recipe,
        ["--train.batch_size", str(setting.batch_size), "--train.mixed_precision", setting.precision],
    )
    keys = {
        "output": str(setting.work / name.replace(", ", "-")),
        "data.source": str(made_up_images(setting.work, experiment.model.sample_size)),
        "model.attention": attention,
        "train.compile": "cuda-graphs" if name.endswith(GRAPHS) else name.endswith(COMPILED),
        "train.gradient_checkpointing": "checkpointing" in name,
        "train.sample_every": 0,
    }
    return override(experiment, keys)


def own_step(experiment: Experiment) -> Step:
    """Our trainer's step: draws, images, network, optimizer, average, and the check for non-finite values."""
    trainer = Trainer(experiment)
    trainer.folder.unlock()  # the process may create several trainers
    return trainer.train_step


def made_up_images(work: Path, size: int, count: int = 2048) -> Path:
    """A file of seeded noise images (count, size, size, 3)."""
    path = work / f"images-{size}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return path


def _images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _unet() -> UNet2DModel:
    """The UNet of diffusers' examples/unconditional_image_generation with the shape of google/ddpm-cifar10-32:
    35.7 million parameters."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=256,
    )


def _dit() -> DiTTransformer2DModel:
    """U-ViT-S/2's width, heads and patches; because of DiT's modulations, 10 blocks have about as many parameters."""
    return DiTTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, in_channels=3, out_channels=3, num_layers=10, sample_size=32,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def _diffusers_step(network: UNet2DModel | DiTTransformer2DModel, setting: Setting) -> Step:
    """A step as in diffusers' unconditional example: AdamW, clipping and its EMAModel, but no cosine schedule."""
    accelerator = Accelerator(mixed_precision="no" if setting.precision == "none" else setting.precision)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    average.to(accelerator.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    noises = DDPMScheduler(num_train_timesteps=1000)
    images = _images(setting.batch_size).to(accelerator.device)
    labels = {}
    if isinstance(network, DiTTransformer2DModel):
        labels["class_labels"] = torch.zeros(setting.batch_size, dtype=torch.long, device=accelerator.device)
    prepared.train()

    def step() -> None:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device)
        predicted = prepared(noises.add_noise(images, noise, timesteps), timesteps, **labels).sample
        loss = F.mse_loss(predicted.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step
