"""UViTPipeline: generates images with a UViT; loads and saves like any diffusers pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.schedulers import (
    noise_ratio,
    prediction_converter,
    scheduler_prediction_type,
    set_timesteps,
    step_noise,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class UViTPipeline(DiffusionPipeline):
    """Pixel-space image generation, unconditional or by class.

    Args:
        unet: the backbone, a UViT or a model with its signature, in_channels, sample_size and num_classes. diffusers'
            image pipelines use this name for any architecture.
        scheduler: any diffusers scheduler of the same noise process; swap it with `Scheduler.from_config`.
        prediction_type: what the network predicts, if the scheduler doesn't say (as on the flow) or expects another
            type; None means what the scheduler expects.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, prediction_type: str | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if prediction_type is not None:
            self.register_to_config(prediction_type=prediction_type)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """The current call's scale; a callback changes it for the following steps by setting `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network calls in the current call, one per timestep of the scheduler."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call stops before its next step; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: Tensor | None = None,
        guidance_interval: Sequence[float] | None = None,
        guide: "UViTPipeline | None" = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Args:
            batch_size: number of images; None is one per class label, generator or latent, or 1 if none is a list.
            generator: one, or a list with one per image, so that image k depends on generator k alone.
            num_inference_steps: steps of the scheduler.
            class_labels: one class for all images, or one per image; None uses the model's null label.
            guidance_scale: classifier-free guidance, uncond + scale (cond - uncond), 1 or more; 1 is none. With a
                `guide`, guide + scale (own - guide).
            output_type: "pil", "np" (float32 (B, H, W, C) in [0, 1]), "pt" (float32 (B, C, H, W) in [0, 1]) or
                "latent" (the last sample, (B, C, H, W), neither decoded nor clipped).
            return_dict: False returns a tuple.
            callback_on_step_end: called after each step as callback(pipe, step, timestep, {"latents": x_t}); a
                returned "latents" replaces it.
            callback_on_step_end_tensor_inputs: the tensors that the callback gets: "latents" or none.
            latents: (B, C, H, W), the initial noise, of unit variance; None draws it from `generator`.
            guidance_interval: (low, high) guides only where low < sigma / alpha <= high (Kynkaanniemi et al. 2024,
                arXiv 2404.07724); other steps cost as much as without guidance. None guides everywhere.
            guide: a pipeline for autoguidance (Karras et al. 2024, arXiv 2406.02507), such as one of an earlier step or
                of a smaller network. It gets the same labels and replaces the null label. It must have the same noise
                process, shape and classes, but may have another prediction type.

        Raises:
            InputError: labels or guidance for an unconditional model, guidance for one without a null label, labels,
                guidance or steps out of range, an unknown output type, latents of the wrong shape, arguments for
                different numbers of images, or a guide that doesn't match.
        """
        labels = _as_labels(class_labels, self.unet.num_classes)
        batch_size = _batch_size(batch_size, labels, generator, latents)
        if num_inference_steps < 1:
            raise InputError(f"`num_inference_steps` must be 1 or more, got {num_inference_steps}")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            given = list(callback_on_step_end_tensor_inputs)
            raise InputError(f"`callback_on_step_end_tensor_inputs` must be latents or none, got {given}")
        check_guidance(guidance_scale, guidance_interval, guide is not None)
        if guide is not None:
            check_guide(self, guide)
        self._guidance_scale, self._interrupt = guidance_scale, False
        if labels is not None:
            labels = labels.expand(batch_size).to(self._execution_device)
        self._check_guidance(labels, guide)
        shape = (batch_size, *_sample_shape(self.unet))
        device, dtype = self._execution_device, self.unet.dtype
        # The sampler's own arithmetic stays float32; only the network runs in the pipeline's dtype.
        sample_dtype = torch.promote_types(dtype, torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=sample_dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}")
        set_timesteps(self.scheduler, num_inference_steps, device)
        if hasattr(self.scheduler, "set_begin_index"):
            # Otherwise schedulers look up the first timestep, and skip steps if rounding made it occur twice.
            self.scheduler.set_begin_index(0)
        # Flow-matching schedulers have no scale.
        sample = latents.to(device, sample_dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        self._num_timesteps = len(self.scheduler.timesteps)
        guided = self._guided_timesteps(guidance_interval)
        convert, convert_guide = (
            None if each is None else prediction_converter(network_prediction_type(each), self.scheduler)
            for each in (self, guide)
        )

        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                break
            x_t = scale_model_input(sample, timestep)
            scale = self.guidance_scale if guided[index] else 1.0
            null_scale = scale if guide is None else 1.0
            prediction = self._predict(x_t.to(dtype), timestep, labels, null_scale).to(sample_dtype)
            if convert is not None:
                prediction = convert(prediction, x_t, timestep)
            if guide is not None and scale != 1:
                theirs = guide._predict(x_t.to(guide.unet.dtype), timestep, labels, 1.0).to(sample_dtype)
                if convert_guide is not None:
                    theirs = convert_guide(theirs, x_t, timestep)
                prediction = _guide(prediction, theirs, scale, self.unet.in_channels)
            noise = step_noise(self.scheduler, index, sample, generator)
            sample = self.scheduler.step(prediction, timestep, sample, **noise).prev_sample
            if callback_on_step_end is not None:
                tensors = {name: {"latents": sample}[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, index, timestep, tensors)
                sample = (returned or {}).get("latents", sample)
                self._check_guidance(labels, guide)

        output: Any = sample if output_type == "latent" else self._to_images(sample)
        if output_type in ("np", "pil"):
            output = output.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            output = self.numpy_to_pil(output)
        self.maybe_free_model_hooks()
        if guide is not None:
            guide.maybe_free_model_hooks()
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _to_images(self, sample: Tensor) -> Tensor:
        """The sampler's final sample as images in [0, 1]."""
        return (sample / 2 + 0.5).clamp(0, 1)

    def _predict(self, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        channels = self.unet.in_channels
        if labels is None or guidance_scale == 1.0:
            prediction = self.unet(sample, timestep, labels).sample
        else:
            null = torch.full_like(labels, self.unet.num_classes)
            both = self.unet(torch.cat([sample, sample]), timestep, torch.cat([null, labels])).sample
            unconditional, conditional = both.chunk(2)
            prediction = _guide(conditional, unconditional, guidance_scale, channels)
        # Only the DDPM scheduler uses a predicted variance.
        takes_variance = isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in (
            "learned",
            "learned_range",
        )
        return prediction if takes_variance else prediction[:, :channels]

    def _guided_timesteps(self, interval: Sequence[float] | None) -> list[bool]:
        """Whether guidance applies at each of the scheduler's timesteps. Computed once, since it waits for the GPU."""
        if interval is None:
            return [True] * len(self.scheduler.timesteps)
        ratios = noise_ratio(self.scheduler)(self.scheduler.timesteps.cpu())
        return ((interval[0] < ratios) & (ratios <= interval[1])).tolist()

    def _check_guidance(self, labels: Tensor | None, guide: "UViTPipeline | None") -> None:
        check_guidance(self.guidance_scale)
        if guide is not None:
            return
        # A class-conditional UViT has a null label; other networks say if they have none.
        check_null_label(self.guidance_scale, self.unet.num_classes, getattr(self.unet, "has_null_label", True))
        if self.guidance_scale != 1 and labels is None:
            raise InputError(f"`class_labels` must be given for guidance_scale {self.guidance_scale}, got None")


def network_prediction_type(pipeline: DiffusionPipeline) -> str | None:
    """The prediction type of a pipeline's network, as a name in PREDICTION_TYPES; None if its components don't say."""
    return pipeline.config.get("prediction_type") or scheduler_prediction_type(pipeline.scheduler)


def check_guidance(scale: Any, interval: Any = None, has_guide: bool = False) -> None:
    """Raises InputError for guidance settings that are out of range or have no effect."""
    if not isinstance(scale, int | float) or not 1 <= scale < float("inf"):
        raise InputError(f"`guidance_scale` must be 1 (no guidance) or more, got {scale}")
    if has_guide and scale == 1:
        raise InputError(f"`guidance_scale` must be above 1 with a guide, got {scale}")
    if interval is None:
        return
    is_pair = isinstance(interval, list | tuple) and len(interval) == 2
    is_pair = is_pair and all(isinstance(each, int | float) for each in interval)
    if not (is_pair and 0 <= interval[0] < interval[1] < float("inf")):
        raise InputError(f"`guidance_interval` must be two noise levels low < high, 0 or more, got {interval}")
    if scale == 1:
        raise InputError(f"`guidance_interval` must be left out for guidance_scale 1 (no guidance), got {interval}")


def check_null_label(scale: float, num_classes: int | None, has_null_label: bool) -> None:
    """Raises InputError for classifier-free guidance of a model that doesn't support it."""
    if scale != 1 and (num_classes is None or not has_null_label):
        kind = "an unconditional model" if num_classes is None else "a model without a null label"
        raise InputError(f"`guidance_scale` must be 1 for {kind}, got {scale}")


def check_guide(pipeline: UViTPipeline, guide: Any) -> None:
    """Raises InputError unless a guide's predictions can be combined with a pipeline's."""
    if not isinstance(guide, UViTPipeline):
        raise InputError(f"`guide` must be a UViTPipeline, got a {type(guide).__name__}")
    for what, of in (("shape", _sample_shape), ("num_classes", lambda network: network.num_classes)):
        ours, theirs = of(pipeline.unet), of(guide.unet)
        if ours != theirs:
            raise InputError(f"`guide` must have {what} {ours}, as the pipeline it guides, got {theirs}")
    count = pipeline.scheduler.config.get("num_train_timesteps")
    if count is not None and count == guide.scheduler.config.get("num_train_timesteps"):
        own, theirs = (noise_ratio(each.scheduler)(torch.arange(1, count)) for each in (pipeline, guide))
        # Closed forms and float32 tables of betas agree within this tolerance; different processes differ by more.
        if torch.allclose(own, theirs, rtol=1e-2):
            return
    raise InputError("`guide` must have the noise process of the pipeline it guides, got another process")


def _guide(prediction: Tensor, worse: Tensor, scale: float, channels: int) -> Tensor:
    """Pushes a prediction away from a worse one.

    Channels beyond those of the image, such as a predicted variance, are not guided.
    """
    ours, theirs = prediction[:, :channels], worse[:, :channels]
    return torch.cat([theirs + scale * (ours - theirs), prediction[:, channels:]], dim=1)


def _sample_shape(network: Any) -> tuple[int, int, int]:
    """(C, H, W) of a network's samples."""
    size = network.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.in_channels, height, width


def _as_labels(class_labels: Any, num_classes: int | None) -> Tensor | None:
    """Class labels as int64, () for all images or (B,). Raises InputError unless they are classes of the model."""
    if class_labels is None:
        return None
    if num_classes is None:
        raise InputError("`class_labels` must be None for an unconditional model, got labels")
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError):  # not numbers, or a ragged list of lists
        labels = torch.empty(1)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.numel() and not (whole and labels.min() >= 0 and labels.max() < num_classes):
        raise InputError(f"`class_labels` must be integers, 0 to {num_classes - 1}, got {class_labels}")
    return labels.long() if labels.dim() == 0 else labels.long().reshape(-1)


def _batch_size(batch_size: int | None, labels: Tensor | None, generator: Any, latents: Tensor | None) -> int:
    """The number of images that a call's arguments imply. Raises InputError if they disagree or it is zero."""
    counts = {
        "batch_size": batch_size,
        "class_labels": None if labels is None or labels.dim() == 0 else labels.numel(),
        "generator": len(generator) if isinstance(generator, list) else None,
        "latents": None if latents is None else len(latents),
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        sources = ", ".join(f"{count} from {name}" for name, count in given.items())
        raise InputError(f"{' and '.join(given)} must be for the same number of images, got {sources}")
    size = next(iter(given.values()), 1)
    if size < 1:
        raise InputError(f"`batch_size` must be 1 or more, got {size}")
    return size
