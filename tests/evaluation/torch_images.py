"""Images as a dataset for torch-fidelity."""

import numpy as np
import torch


class Images(torch.utils.data.Dataset):
    """uint8 images (N, C, H, W) by index."""

    def __init__(self, images: np.ndarray | torch.Tensor) -> None:
        self.images = torch.as_tensor(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]
