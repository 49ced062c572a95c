"""What a LoRA-like file is where it is no LoRA for SDXL: a name for the message.

Their keys and header entries would otherwise be unknown, or worse, be passed over.
"""

import re
from pathlib import Path

from sdxl.weights import summary

# Marks in a key; the first row that fits a file counts.
OTHER_ADAPTERS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA", r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr",
    r"boft_": "a BOFT", r"oft_": "an OFT", r"ia3_|\.on_input$": "an (IA)^3 adapter",
    r"\.[ab][12]\.weight$|glora_": "a GLoRA", r"lora_mid": "a LoCon with Tucker factors",
    r"lora_E$|lora_ranknum": "an AdaLoRA", r"lora_diag": "a KaSA", r"vera_lambda": "a VeRA",
    r"scale_weight|weight_scale|scaled_fp8|absmax|quant_state|comfy_quant": "a quantised LoRA",
    r"\.diff$|\.diff_b$|\.set_weight$": "full differences of weights (.diff)",
    r"\.[wb]_norm$": "a LyCORIS with changed normalisation layers",
    r"modules_to_save|original_module": "a LoRA with whole layers beside it (modules_to_save)",
    r"lora_(B|up)(\.\w+)?\.bias$|\.lora_bias": "a LoRA with biases",
    r"lora_embedding_": "a LoRA of a token embedding",
    r"^bundle_emb\.": "a LoRA with a textual-inversion embedding (bundle_emb)",
}  # fmt: skip
OTHER_FILES = {
    r"^(clip_[lg]|emb_params|string_to_param.*)$": "a textual-inversion embedding",
    r"^(lora_)?controlnet|^lllite_": "a ControlNet LoRA",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(model\.diffusion_model|first_stage_model|conditioner)\.(?!.*lora)(?!.*\.alpha$)":
        "a whole checkpoint, for --model",
    r"^(conv_in|down_blocks\.0\.resnets\.0\.conv1|input_blocks\.0\.0)\.weight$":
        "a whole UNet, for --unet",
}  # fmt: skip

# Marks in a key of a LoRA for another family of models. SDXL has levels 0 to 2, blocks 0 to 8, and
# no attention in level 0.
FAMILIES = {
    r"(double|single)_blocks[._]|single_transformer_blocks": "Flux or another model of its kind",
    r"joint_blocks|add_[qkv]_proj|lora_te3": "Stable Diffusion 3",
    r"lora_prior_": "Stable Cascade",
    r"(^|[._])blocks[._]\d+[._](self|cross)_attn": "Wan",
    r"lora_te_|(down|up)_blocks[._]3|down_blocks[._]0[._]attentions|up_blocks[._]2[._]attentions"
    r"|(in|out)put_blocks[._](9|1[01])[._]|input_blocks[._][12][._]1[._]":
        "Stable Diffusion 1 or 2, or SDXL's refiner",
    r"^(base_model\.model\.)?transformer\.|lora_transformer_|^((diffusion_model|lora_unet)[._])?"
    r"(transformer_blocks|layers|blocks)[._]\d": "a diffusion transformer",
}  # fmt: skip
# The width of a prompt's features, where the keys look like SDXL's.
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's refiner"}

# Header entries of other trainers on what a LoRA is for, and the values that name another family.
# They are free text ("pony" is SDXL too): what is not known to be wrong passes, the keys decide.
BASE_ENTRIES = ("ss_base_model_version", "modelspec.architecture")
OTHER_BASES = re.compile(
    r"^s[ds][-_ ]?v?[123]|stable-diffusion-v?[123]|refiner|xl-v1-edit|flux|chroma|lumina|hunyuan"
    r"|anima\b|\bwan|qwen|z-?image|pixart|cascade|auraflow|kolors|^ltx|klein|cosmos",
    re.IGNORECASE,
)
NOT_EPS = {"ss_v2": "true|1", "ss_v_parameterization": "true|1", "ss_zero_terminal_snr": "true|1",
           "modelspec.prediction_type": "(?!(eps|epsilon|none)$).+"}  # fmt: skip


def check_header(path: Path, header: dict[str, str]) -> None:
    """ValueError in one line if a LoRA's header says that it is for another model."""
    for entry in BASE_ENTRIES:
        if OTHER_BASES.search(base := header.get(entry, "")):
            raise ValueError(f"{path} is for another model: its header says {entry} {base[:60]!r}")
    for entry, values in NOT_EPS.items():
        if re.fullmatch(values, value := header.get(entry, ""), re.IGNORECASE):
            raise ValueError(
                f"{path} was not trained on eps-prediction with SDXL's schedule (its header says "
                f"{entry} {value[:60]!r}, v-prediction or the like): it would distort a "
                "network that predicts eps"
            )


def check_keys(path: Path, keys) -> None:
    """ValueError in one line if keys are those of another kind of file or adapter."""
    if broken := [key for key in keys if len(key) > 300 or not key.isprintable()]:
        raise ValueError(f"{path} is no LoRA: {broken[0][:60]!r} is no layer's name")
    for table in (OTHER_ADAPTERS, OTHER_FILES):
        for mark, kind in table.items():
            if matches := [key for key in keys if re.search(mark, key)]:
                hint = "merge it with the program that it is for: only plain LoRAs are read"
                hint = f": {hint}" if table is OTHER_ADAPTERS else ""
                raise ValueError(
                    f"{path} is no plain LoRA but {kind} ({summary('such keys', matches)}){hint}"
                )


def other_family(keys) -> str:
    """The family of models that has layers of these names, "" if that cannot be told."""
    for mark, family in FAMILIES.items():
        if any(re.search(mark, key) for key in keys):
            return family
    return ""
