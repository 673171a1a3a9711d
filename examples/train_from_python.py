"""Trains a UViT with DIA-LSTM on scikit-learn's digits with the library's components: no recipe, no Trainer.

    python examples/train_from_python.py

It takes a few minutes on a CPU and writes digits.png and the pipeline folder digits, which `dia-diffusion sample` and
diffusers load. `dia-diffusion train` adds what a real training needs: checkpoints, resuming, several GPUs, bfloat16.
"""

from pathlib import Path

import torch
from PIL import Image

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.data import open_images
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.training.config import EmaConfig
from dia_diffusion.training.ema import EMA

BATCH_SIZE = 32


def main(folder: Path = Path("."), steps: int = 2000) -> list[float]:
    """Trains for `steps` steps, writes samples and pipeline into `folder`, and returns the losses."""
    # Data: uint8 images (N, 1, 8, 8) to [-1, 1].
    digits = open_images("digits", split="train", channels=1)
    images = torch.from_numpy(digits.read(range(len(digits)))).float() / 127.5 - 1

    # Model: a small U-ViT whose blocks share one attention unit, and the average of its weights.
    torch.manual_seed(0)
    model = UViT(
        sample_size=8,
        in_channels=1,
        patch_size=4,
        hidden_size=128,
        num_layers=5,
        num_attention_heads=4,
        attention="dia-lstm-identity",
    )
    parameters = list(model.parameters())
    ema = EMA(parameters, EmaConfig(decay=0.999, warmup=True))
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100))

    # Noise: x_t = alpha(t) x_0 + sigma(t) noise; the network predicts x_0.
    process = NoiseProcess("cosine", prediction_type="sample")

    losses = []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = images[torch.randint(len(images), (BATCH_SIZE,), generator=generator)]  # (B, 1, 8, 8)
        noise = torch.randn(batch.shape, generator=generator)
        timestep = process.timestep(torch.rand(BATCH_SIZE, generator=generator))  # (B,)
        noisy, target = process.mix(batch, noise, timestep)
        loss = (model(noisy, timestep).sample - target).square().mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update(parameters, skip=torch.tensor(False))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.4f}")

    # Samples: the averaged weights in a diffusers pipeline, one image per seed.
    with torch.no_grad():
        for parameter, average in zip(parameters, ema.parameters, strict=True):
            parameter.copy_(average)
    pipeline = UViTPipeline(model.eval(), process.build_scheduler())
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    (samples,) = pipeline(generator=generators, num_inference_steps=25, return_dict=False)
    grid = Image.new("L", (32, 32))
    for index, image in enumerate(samples):
        grid.paste(image, (8 * (index % 4), 8 * (index // 4)))
    grid.resize((512, 512), Image.Resampling.NEAREST).save(folder / "digits.png")
    pipeline.save_pretrained(folder / "digits")
    return losses


if __name__ == "__main__":
    main()
