"""What a LoRA-like file is where it is no LoRA for SDXL: a name for the message.

Their keys and header entries would otherwise be unknown, or worse, be passed over.
"""

import re
from pathlib import Path

from sdxl.weights import check_prediction, summary

# Marks in a key; the first row that fits a file counts.
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA", r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr",
    r"oft_": "an OFT", r"ia3_|\.on_input$": "an (IA)^3 adapter",
    r"\.[ab][12]\.weight$|glora_": "a GLoRA", r"lora_mid\.": "a LoCon with Tucker factors",
    r"scale_weight|weight_scale|scaled_fp8|absmax|quant_state|comfy_quant": "a quantised LoRA",
    r"\.diff$|\.diff_b$|\.set_weight$": "full differences of weights (.diff)",
    r"\.[wb]_norm$": "a LyCORIS with changed normalisation layers",
    r"modules_to_save|original_module": "a LoRA with whole layers beside it (modules_to_save)",
    r"lora_(B|up)(\.\w+)?\.bias$": "a LoRA with biases",
    r"^bundle_emb\.": "a LoRA with a textual-inversion embedding (bundle_emb)",
    r"^(clip_[lg]|emb_params|string_to_param.*)$": "a textual-inversion embedding",
    r"^(lora_)?controlnet|^lllite_": "a ControlNet LoRA",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(model\.diffusion_model|first_stage_model|conditioner)\.(?!.*lora)(?!.*\.alpha$)":
        "a whole checkpoint, for --model",
    r"^(conv_in|down_blocks\.0\.resnets\.0\.conv1|input_blocks\.0\.0)\.weight$":
        "a whole UNet, for --unet",
    r"^(encoder|decoder)\.(conv_in|down|up)": "an autoencoder, for --vae",
}  # fmt: skip

# Marks in a key of a LoRA for another family of models. SDXL has levels 0 to 2, blocks 0 to 8, and
# no attention in level 0.
FAMILIES = {
    r"lora_te_|(down|up)_blocks[._]3|down_blocks[._]0[._]attentions|up_blocks[._]2[._]attentions"
    r"|(in|out)put_blocks[._](9|1[01])[._]|input_blocks[._][12][._]1[._]":
        "Stable Diffusion 1 or 2, or SDXL's refiner",
    r"(double|single|joint)_(transformer_)?blocks|lora_te3|lora_transformer_"
    r"|^(base_model\.model\.)?transformer\."
    r"|^((diffusion_model|lora_unet)[._])?(transformer_blocks|layers|blocks)[._]\d":
        "a diffusion transformer, such as Flux or Stable Diffusion 3",
}  # fmt: skip

# Header entries of other trainers on what a LoRA is for, and the values that name another family.
# They are free text ("pony" is SDXL too): what is not known to be wrong passes, the keys decide.
BASE_ENTRIES = ("ss_base_model_version", "modelspec.architecture")
OTHER_BASES = re.compile(
    r"^sd[-_ ]?v?[123]|stable-diffusion-v?[123]|refiner|xl-v1-edit|flux|chroma|lumina|hunyuan"
    r"|\bwan|qwen|z-?image|pixart|cascade|auraflow|kolors|^ltx",
    re.IGNORECASE,
)


def check_header(path: Path, header: dict[str, str]) -> None:
    """ValueError in one line if a LoRA's header says that it is for another model."""
    for entry in BASE_ENTRIES:
        if OTHER_BASES.search(base := header.get(entry, "")):
            raise ValueError(f"{path} is for another model: its header says {entry} {base[:60]!r}")
    check_prediction(path, (), header)


def check_keys(path: Path, keys) -> None:
    """ValueError in one line if keys are those of another kind of file or adapter."""
    if broken := [key for key in keys if len(key) > 300 or not key.isprintable()]:
        raise ValueError(f"{path} is no LoRA: {broken[0][:60]!r} is no layer's name")
    for mark, kind in OTHER_KINDS.items():
        if matches := [key for key in keys if re.search(mark, key)]:
            matches = summary("such keys", matches)
            raise ValueError(f"{path} is {kind} ({matches}): only plain LoRAs are read")


def other_family(keys) -> str:
    """The family of models that has layers of these names, "" if that cannot be told."""
    for mark, family in FAMILIES.items():
        if any(re.search(mark, key) for key in keys):
            return family
    return ""
