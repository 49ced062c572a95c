"""The files that a distillation leaves for users, with its settings in their headers."""

from pathlib import Path

from torch import Tensor

from common import files
from sdxl.lora_files import write_both
from sdxl.recipe import RECOMMENDED
from training.build import DistillConfig
from training.distill import TDDStep, TDMStep


def export(
    config: DistillConfig, model: Path, resolution: int, step: TDDStep | TDMStep, folder: Path,
    steps: int, weights: dict,
) -> None:  # fmt: skip
    """The student's files after so many steps, with its settings in their headers."""
    low, high = config.w
    settings = {
        "method": config.method, "w": low if low == high else [low, high], "tcf": config.tcf,
        "solver_steps": config.solver_steps, "steps": steps, "base": model.resolve().name,
        "adversarial": config.adv, "ema": config.mu, "resolution": resolution,
    }  # fmt: skip
    settings["cfg"], settings["gamma"] = RECOMMENDED[config.method]
    # Eq. 5's range, PCM's number of segments, TDM's K; the others have none.
    match config.method:
        case "tdm":
            settings |= {"K": list(config.Ks), "solver": config.solver}
        case "tdd" if config.Ks:
            settings |= {"K": list(config.Ks), "gamma": 0.0}
        case "tdd":
            settings["K"] = f"{config.kmin}-{config.kmax}"
        case "pcm":
            settings["K"] = config.kmin
    if config.method != "tdm":
        settings |= {"eta": config.eta, "rho": config.rho, "pairs": config.pairs}
    if config.told_ks:
        settings["told_ks"] = list(config.told_ks)
    # A prefix, because other programs write into this header too.
    metadata = {f"tdd_{name}": str(value) for name, value in settings.items()}
    if config.full:
        unet_json = files.read_json(model / "unet" / "config.json")
        export_unet(folder, step, weights, unet_json, metadata)
    else:
        write_both(folder / "lora.safetensors", step.output_network.lora, **metadata)


def export_unet(
    folder: Path, step: TDDStep, weights: dict[str, Tensor], unet_json: dict, metadata: dict
) -> None:
    """unet/ in diffusers' layout: the moving average of --full's UNet if there is one."""
    network = "student" if step.target_net is step.student else "target"
    prefix = f"{network}/base."
    tensors = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    output = files.output_folder(folder / "unet")
    path = output / "diffusion_pytorch_model.safetensors"
    files.write_tensors(path, tensors, format="pt", **metadata)
    files.write_json(output / "config.json", unet_json | {"scalar": step.full.config.scalar})
