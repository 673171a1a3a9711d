"""Inserts a shared DIA-LSTM into your own network, and trains both on scikit-learn's digits.

python examples/attach_to_your_network.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion import attach
from dia_diffusion.data import open_images


class Block(nn.Module):
    """A residual block; the unit scales the output of conv2 per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def main(steps: int = 300) -> list[float]:
    """Trains for `steps` steps and returns the losses."""
    digits = open_images("digits", split="train", channels=1)
    assert digits.labels is not None
    images = torch.from_numpy(digits.read(range(len(digits)))).float() / 127.5 - 1  # (N, 1, 8, 8)
    labels = torch.from_numpy(digits.labels)

    torch.manual_seed(0)
    trunk = [nn.Conv2d(1, 32, 3, padding=1), *(Block(32) for _ in range(4))]
    model = nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    # Before optimizer, DDP and torch.compile. Consecutive points with equal channel counts share a unit, here all four.
    attached = attach(model, "dia-lstm-identity", at=[f"{index}.conv2" for index in range(1, 5)])
    for stage in attached.stages:
        print(f"one unit for {len(stage.positions)} insertion points of {stage.channels} channels")

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}")
    return losses


if __name__ == "__main__":
    main()
