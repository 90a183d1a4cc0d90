"""The noise levels that a model was trained at, read from the scheduler file of its folder.

The file names a sampler and holds its settings. Training depends only on the betas, or on the shift of a
rectified flow, and on what the network predicts; a file that may mean other levels is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourdfy.bounds import Bounds
from fourdfy.config_files import ConfigError
from fourdfy.priors.model_folder import description_file, read_description

CLASSES = {
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
"""Samplers of models that were trained as in DDPM (Ho et al. 2020): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps,
with a_t the running product of 1 - beta."""

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
"""A sampler of rectified flows. Others are told by ``use_flow_sigmas: true``; their files may still hold the
betas of another model."""

COGVIDEOX_CLASSES = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}
"""Samplers of CogVideoX, whose signal-to-noise ratio is shifted: ``ops.diffusion.shifted_alphas_cumprod``."""

SAMPLING = {
    "algorithm_type", "base_image_seq_len", "base_shift", "clip_sample", "clip_sample_range",
    "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "max_image_seq_len", "max_shift", "noise_sampler_seed", "original_inference_steps", "predict_x0",
    "predictor_order", "sample_max_value", "set_alpha_to_one", "sigma_max", "sigma_min", "skip_prk_steps",
    "solver_order", "solver_p", "solver_type", "steps_offset", "stochastic_sampling", "tau_func",
    "thresholding", "time_shift_type", "timestep_scaling", "timestep_spacing", "use_beta_sigmas",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
"""Keys that only concern sampling; ``flow_shift`` and ``time_shift_type`` apply only to flow sigmas, and the
bounds of shifts only to dynamic ones."""

BETA = Bounds(above=0, high=0.9999)

Allowed = Bounds | range | tuple[Any, ...] | type[str]
"""Numbers, whole numbers, some values, or any text."""

ALLOWED: dict[str, Allowed] = {
    "num_train_timesteps": range(2, 100_001),
    "beta_start": BETA,
    "beta_end": BETA,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "rescale_betas_zero_snr": (False, True),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "snr_shift_scale": (1.0,),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Values that are understood: of the keys that say the betas, and of those with which a known class
means another kind of model."""

FLOW: dict[str, Allowed] = ALLOWED | {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "invert_sigmas": (False,),
}
"""The same for a rectified flow, besides its shift."""

SHIFT = Bounds(above=0, high=1000)

BY_TOKENS: dict[str, Allowed] = {
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), range(1, 10**6)),
    **dict.fromkeys(("base_shift", "max_shift"), Bounds(-10, 10)),
}
"""Keys of a flow whose shift depends on the number of tokens: its logarithm is linear in it."""

TERMINAL = Bounds(0, 0.99)
"""Of ``shift_terminal``, the least noise that samplers use; the noise of all levels is raised towards it."""

COGVIDEOX: dict[str, Allowed] = ALLOWED | {
    "beta_schedule": ("scaled_linear",),
    # From noise without any signal, as zero_snr has it, no epsilon tells x_0.
    "prediction_type": ("v_prediction",),
    "snr_shift_scale": SHIFT,
    "trained_betas": (None,),
}
"""The same for CogVideoX."""

LINEAR = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
"""Keys that a file must hold, since each class has its own defaults; ``trained_betas`` replaces them."""


def read_scheduler(folder: Path) -> tuple[dict[str, Any], str]:
    """(arguments for a ``DDPMScheduler`` with the model's betas, its ``prediction_type``). For CogVideoX they
    are those of ``ops.diffusion.shifted_alphas_cumprod``; of a rectified flow, those of a ``FlowSchedule``
    besides its device, and ``flow_prediction``.

    Raises:
        ConfigError: the file may describe other noise levels; names it, its class and the keys in question.
    """
    config = read_description(folder, "scheduler")
    name = config.get("_class_name")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    is_shifted = str(name) in COGVIDEOX_CLASSES
    betas = None if is_shifted else config.pop("trained_betas", None)
    is_flow = not is_shifted and (name == FLOW_CLASS or config.get("use_flow_sigmas") is True)
    known = COGVIDEOX if is_shifted else ALLOWED
    needed: tuple[str, ...] = LINEAR if betas is None else ()
    if is_shifted:
        needed = (*LINEAR, "snr_shift_scale")
    elif is_flow:
        known, needed = _keys_of_flow(name, config)
    problems = [f"{key} is missing" for key in needed if key not in config]
    problems += [
        f"{key}={repr(config[key])[:60]}, expected {either(allowed)}"
        for key, allowed in known.items()
        if key in config and not fits(config[key], allowed)
    ]
    if unknown := sorted(config.keys() - known.keys() - SAMPLING):
        problems.append(f"unknown keys that might change the noise levels: {', '.join(unknown)}")
    if betas is not None and not (
        isinstance(betas, list) and len(betas) > 1 and all(fits(beta, BETA) for beta in betas)
    ):
        problems.append(f"trained_betas, expected a list of numbers, each {BETA}")
    few, many = [*BY_TOKENS][:2]
    if many in needed and not problems and config[few] >= config[many]:
        problems.append(f"{few} is not less than {many}")
    if str(name) not in (classes := CLASSES | COGVIDEOX_CLASSES | {FLOW_CLASS}):
        problems = [f"the known classes (_class_name) are {', '.join(sorted(classes))}"]
    if problems:
        raise ConfigError(
            f"{description_file(folder, 'scheduler')} describes a {str(name)[:60]} whose noise levels "
            f"are not understood: {'; '.join(problems)}"
        )
    if is_flow:
        return _flow_levels(config), "flow_prediction"
    levels = {key: config[key] for key in (*needed, "rescale_betas_zero_snr") if key in config}
    return levels | ({} if is_shifted else {"trained_betas": betas}), config.get("prediction_type", "epsilon")


def _keys_of_flow(name: object, config: Mapping[str, Any]) -> tuple[dict[str, Allowed], tuple[str, ...]]:
    """(what is understood of a rectified flow's file, the keys that it must hold)."""
    if name != FLOW_CLASS:
        return FLOW | {"flow_shift": SHIFT}, ("num_train_timesteps", "flow_shift", "prediction_type")
    known = FLOW | {"shift": SHIFT, "use_dynamic_shifting": (False, True)}
    if config.get("shift_terminal") is not None:
        known["shift_terminal"] = TERMINAL
    needed = ("num_train_timesteps", "shift")
    if not config.get("use_dynamic_shifting"):
        return known, needed
    return known | BY_TOKENS | {"time_shift_type": ("exponential",)}, (*needed, *BY_TOKENS)


def _flow_levels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a ``FlowSchedule``, from a file that is understood."""
    shift = float(config.get("shift", config.get("flow_shift")))
    found = {"shift": shift, "num_train_timesteps": config["num_train_timesteps"]}
    if config.get("use_dynamic_shifting"):
        few, many, least, most = (config[key] for key in BY_TOKENS)
        found["by_tokens"] = ((few, least), (many, most))
    if config.get("shift_terminal"):
        found["least"] = config["shift_terminal"]
    return found


def fits(value: Any, allowed: Allowed) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if isinstance(allowed, type):
        return isinstance(value, allowed)
    return type(value) in ((int,) if isinstance(allowed, range) else (int, float)) and value in allowed


def either(allowed: Allowed) -> str:
    """``allowed``, for messages."""
    if isinstance(allowed, tuple):
        return " or ".join(map(repr, allowed))
    if isinstance(allowed, type):
        return "a name"
    return f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else str(allowed)
