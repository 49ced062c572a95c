"""Strict loading of weights, without a second copy.

Weights are memory-mapped and assigned to modules built on the meta device: no weight is initialised
only to be replaced, and a module uses the file's pages until its precision or device changes.
"""

import gc
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.files import check_finite, read_json

HALF = torch.float16, torch.bfloat16


def find_weights(folder: Path, half: bool = False) -> list[Path]:
    """A component's weights, a file or shards: .fp16 last, or first if half; ValueError if none."""
    # Diffusers names the files of its networks one way, transformers the other.
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in (".fp16", "") if half else ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.exists():
                return [single]
            if index.exists():
                if shards := set(read_json(index).get("weight_map", {}).values()):
                    return [folder / name for name in sorted(shards)]
                raise ValueError(f"{index} names no shards; download the folder again")
    raise ValueError(f"{folder} holds no diffusion_pytorch_model or model .safetensors")


def find_lora(path: Path) -> Path:
    """The file of --lora PATH: itself, or the one in a folder; ValueError unless there is one."""
    if not path.is_dir():
        return path
    # A run's lora.safetensors stands beside the same in kohya's naming.
    names = ("adapter_model", "pytorch_lora_weights", "lora")
    known = [file for name in names if (file := path / f"{name}.safetensors").exists()]
    files = known or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} is a folder with {len(files)} .safetensors in it: name one file")
    return files[0]


def split_scale(entry: str) -> tuple[Path, float]:
    """The file and scale of --lora PATH or PATH:SCALE.

    A colon that no number follows belongs to the path, as on Windows.
    """
    path, _, scale = entry.rpartition(":")
    try:
        weight = float(scale) if path else 1.0
    except ValueError:
        path, weight = entry, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {entry}: the scale is {weight}")
    return find_lora(Path(path or entry)), weight


# ------------------------------------------------------------------------------- what is predicted
#
# Models that predict v, or were trained on another noise schedule, have SDXL's very tensors: with
# eps and SDXL's schedule their pictures would be noise.

V_MARKERS = ("v_pred", "ztsnr", "edm_vpred.", "edm_mean")
# Header entries of files, and their values for eps-prediction in small letters.
EPS, NO = ("", "none", "eps", "epsilon"), ("", "none", "false", "0")
PREDICTION_ENTRIES = {
    "modelspec.prediction_type": EPS, "modelspec.predict_key": EPS,  # ComfyUI's
    "ss_v_parameterization": NO, "ss_v2": NO,
}  # fmt: skip


def check_prediction(path: Path, names, header: dict[str, str]) -> None:
    """ValueError if a header, or a tensor's name, says that a file is not for eps-prediction."""
    signs = [name for name in names if name.startswith(V_MARKERS)]
    for entry, values in PREDICTION_ENTRIES.items():
        if (value := header.get(entry, "")).lower() not in values:
            signs.append(f"{entry} {value[:60]}")
    if signs:
        raise ValueError(
            f"{path} is of v-prediction or the like, as its {signs[0]!r} says: only eps-prediction "
            "is supported"
        )


# --------------------------------------------------------------------------------- strict loading
#
# load_state_dict's own message lists every key of a wrong file; a user needs the first few.


class _SkipInit(TorchFunctionMode):
    """Turns nn.init functions into no-ops: on the meta device they take half of a load's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_on_meta(cls, config) -> nn.Module:
    """A network without memory for its weights; `load_strict` gives it those."""
    # Thousands of new modules trigger the garbage collector again and again, in vain: that would
    # take longer than making the modules.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.device("meta"), _SkipInit():
            return cls(config)
    finally:
        if collecting:
            gc.enable()


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert weights to dtype, except that module.KEEP_IN_FP32's stay in float32 beside half.

    None leaves every weight in the file's precision.
    """
    for name, p in module.named_parameters():
        keep = dtype in HALF and name.split(".")[0] in getattr(module, "KEEP_IN_FP32", ())
        p.data = p.data.to(torch.float32 if keep else dtype)


def use_exact_float32(dtype: torch.dtype) -> None:
    """Convolutions in float32 where that was asked for, and not in torch's default, TF32."""
    # TF32 has ten bits, as fp16 has. Beside fp16 it is for the autoencoder, which has the bits to
    # spare; a LoRA's effect is off by 7 % in it.
    torch.backends.cudnn.allow_tf32 = dtype in HALF


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source, dtype=None) -> nn.Module:
    """Give a module made on the meta device its weights, in evaluation mode and without gradients.

    source: the file or folder, for messages. dtype: as for `cast`. Raises ValueError with all
    missing, unexpected and mis-shaped tensors: a user should not have to mend a file key by key;
    and for NaN and infinity, in the file or because dtype is too narrow.
    """
    expected = module.state_dict()
    both = sorted(tensors.keys() & expected.keys())
    shapes, kinds = [], []
    for name in both:
        shape, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            shapes.append(f"{name} {shape} instead of {wanted}")
        if expected[name].is_floating_point() and not tensors[name].is_floating_point():
            kinds.append(name)
    problems = {"missing": sorted(expected.keys() - tensors.keys()),
                "unexpected": sorted(tensors.keys() - expected.keys()), "of another shape": shapes,
                "of whole numbers, as quantised files have them": kinds}  # fmt: skip
    message = "; ".join(summary(kind, names) for kind, names in problems.items() if names)
    if message:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {message}")
    check_finite(source, tensors)
    module.load_state_dict(tensors, assign=True)
    cast(module, dtype)
    if dtype == torch.float16:
        weights = dict(module.named_parameters())
        check_finite(source, weights, "too large for fp16: use --dtype bf16 or float32")
    return module.eval().requires_grad_(False)


def summary(kind: str, entries: list[str]) -> str:
    """The number of entries and the first three of them."""
    more = " .." if len(entries) > 3 else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:3])}{more}"
