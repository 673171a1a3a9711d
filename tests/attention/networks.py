"""Small networks to attach units to."""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

SAMS = ("se", "eca", "cbam", "srm", "spa", "sem", "spem", "sge")


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


class Network(nn.Module):
    """Two stages of residual blocks, 8 and 16 wide; `written_out` is the same network with units written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(8) for _ in range(3))
        self.widen = nn.Conv2d(8, 16, 1)
        self.second = nn.ModuleList(Block(16) for _ in range(2))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.part(self.second, self.widen(self.part(self.first, x)))
        x = checkpoint(self.part, self.first, x, use_reentrant=False)
        return checkpoint(self.part, self.second, self.widen(x), use_reentrant=False)

    def part(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x.tanh()

    def written_out(self, x: Tensor, units: list[nn.Module]) -> Tensor:
        for blocks, unit in zip([self.first, self.second], units, strict=True):
            x = x if blocks is self.first else self.widen(x)
            state = None
            for block in blocks:
                branch, state = unit(F.conv2d(x.relu(), block.conv.weight, block.conv.bias, padding=1), state)
                x = x + branch
            x = x.tanh()
        return x


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def is_branch(name: str, module: nn.Module) -> bool:
    return name.endswith(".conv")


def gradients(model: nn.Module, *losses: Tensor) -> Tensor:
    """Gradients of the losses' sum, with one backward pass per loss."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def tiny_dit(num_layers: int = 3) -> DiTTransformer2DModel:
    sizes = {"sample_size": 8, "patch_size": 2, "num_layers": num_layers}
    return DiTTransformer2DModel(2, 8, in_channels=1, num_embeds_ada_norm=3, **sizes)


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
