"""UViTPipeline: images from noise with a UViT, loaded and saved like any diffusers pipeline."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dia_diffusion.errors import InputError

OUTPUT_TYPES = ("pil", "np", "pt")


class UViTPipeline(DiffusionPipeline):
    """Pixel-space image generation, unconditional or by class.

    Args:
        unet: the backbone, a UViT or what is called alike and has its in_channels, sample_size and num_classes;
            diffusers' image pipelines call it so whatever its architecture.
        scheduler: any diffusers scheduler of the same noise process; swap it with `Scheduler.from_config`.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Args:
            batch_size: how many.
            generator: one, or a list with one an image: then image k depends on generator k alone.
            num_inference_steps: steps of the scheduler.
            class_labels: a class for all images or one an image; None draws from the model's null label.
            guidance_scale: classifier-free guidance, uncond + scale (cond - uncond), 1 or more; 1 is none.
            output_type: "pil", "np" (float32 (B, H, W, C) in [0, 1]) or "pt" (float32 (B, C, H, W) in [0, 1]).
            return_dict: False returns a tuple.
            callback_on_step_end: called after each step as callback(pipe, step, timestep, {"latents": x_t}); a
                returned "latents" goes on in its place.
            callback_on_step_end_tensor_inputs: the tensors it is given: "latents" or none.

        Raises:
            InputError: labels or guidance for an unconditional model, guidance for one without a null label, labels or
                guidance out of range, an unknown output type, another number of generators than images.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise InputError(f"{len(generator)} generators for {batch_size} images; accepted: one, or one an image")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise InputError(f"a callback can be given latents, not {list(callback_on_step_end_tensor_inputs)}")
        labels = self._check_labels(class_labels, batch_size, guidance_scale)
        size = self.unet.sample_size
        shape = (batch_size, self.unet.in_channels, *((size, size) if isinstance(size, int) else size))
        device, dtype = self._execution_device, self.unet.dtype
        # The sampler's own arithmetic stays float32; only the network runs in the pipeline's dtype.
        sample_dtype = torch.promote_types(dtype, torch.float32)
        sample = randn_tensor(shape, generator=generator, device=device, dtype=sample_dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            # Else schedulers look the first timestep up, and skip steps where rounding made it occur twice.
            self.scheduler.set_begin_index(0)
        sample = sample * self.scheduler.init_noise_sigma
        step_kwargs = self._step_kwargs(generator)

        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(sample, timestep).to(dtype)
            prediction = self._predict(model_input, timestep, labels, guidance_scale).to(sample_dtype)
            sample = self.scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                tensors = {name: {"latents": sample}[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, index, timestep, tensors)
                sample = (returned or {}).get("latents", sample)

        images = self._to_images(sample)
        output: Any = images
        if output_type != "pt":
            output = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            output = self.numpy_to_pil(output)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _to_images(self, sample: Tensor) -> Tensor:
        """What the sampler ends with, as images in [0, 1]."""
        return (sample / 2 + 0.5).clamp(0, 1)

    def _step_kwargs(self, generator: Any) -> dict[str, Any]:
        """Stochastic schedulers take the generator too, so that an image's noise belongs to its seed."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    def _predict(self, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        if labels is None or guidance_scale == 1.0:
            return self.unet(sample, timestep, labels).sample
        null = torch.full_like(labels, self.unet.num_classes)
        both = self.unet(torch.cat([sample, sample]), timestep, torch.cat([null, labels])).sample
        unconditional, conditional = both.chunk(2)
        channels = self.unet.in_channels
        guided = (unconditional + guidance_scale * (conditional - unconditional))[:, :channels]
        # What a network predicts beyond the image's channels, as a variance, is not guided.
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _check_labels(
        self, class_labels: int | list[int] | Tensor | None, batch_size: int, guidance_scale: float
    ) -> Tensor | None:
        num_classes = self.unet.num_classes
        if num_classes is None:
            if class_labels is not None or guidance_scale != 1.0:
                raise InputError("this model is unconditional: it takes neither class_labels nor guidance_scale")
            return None
        if not 1 <= guidance_scale < float("inf"):
            raise InputError(f"guidance_scale {guidance_scale}; accepted: 1, which is none, or more")
        if class_labels is None:
            if guidance_scale != 1.0:
                raise InputError(f"guidance_scale {guidance_scale} needs class_labels")
            return None
        if guidance_scale != 1.0 and not getattr(self.unet, "has_null_label", True):  # a UViT by class has one
            raise InputError(f"guidance_scale {guidance_scale} for a model that has no null label; accepted: 1")
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputError(f"class_labels {labels.tolist()} are no whole numbers; accepted: 0..{num_classes - 1}")
        labels = labels.long()
        labels = labels.expand(batch_size) if labels.dim() == 0 else labels
        if labels.shape != (batch_size,):
            raise InputError(f"{labels.numel()} class_labels for {batch_size} images; accepted: one, or one an image")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise InputError(f"class_labels {labels.tolist()} out of range; accepted: 0..{num_classes - 1}")
        return labels
