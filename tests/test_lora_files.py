"""LoRA files elsewhere and from elsewhere: four programs' rules restated, PEFT's starts, damage."""

import json
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl import keys, load
from sdxl.lora import (
    TARGET_MODULES,
    Adapter,
    LoRA,
    active_adapters,
    add_adapter,
    merge,
    named_layers,
)
from sdxl.lora_files import read_lora, write_diffusers, write_kohya
from sdxl.lora_peft import parse_settings
from sdxl.weights import build_on_meta
from tests.oracles import ALL, close
from tests.test_lora import inputs, peft_unet, theirs
from unet import UNet, UNetConfig


@pytest.fixture
def model(folder):
    return load.load_sdxl(folder)


@pytest.fixture(scope="module")
def tiny(folder):
    """The model for tests that only read files."""
    return load.load_sdxl(folder)


def read(path, model):
    return read_lora(path, model.unet, model.encoder_1, model.encoder_2)


def kohya_names(path):
    return {key.split(".")[0] for key in load_file(path)}


# ------------------------------------------------------------------- the names that programs go by
#
# Written from a reading of sd-scripts' sdxl_original_unet.py and networks/lora.py, AUTOMATIC1111's
# extensions-builtin/Lora/networks.py and network.py, and ComfyUI's lora.py and utils.py.


def original_unet():
    """SDXL's blocks in the original code: (block, class, names of its layers)."""
    resnet = ["in_layers.2", "emb_layers.1", "out_layers.3"]
    inputs, channels = {}, [320, 320, 320, 320, 640, 640, 640, 1280, 1280]
    for n in (1, 2, 4, 5, 7, 8):
        skip = ["skip_connection"] if n in (4, 7) else []
        inputs[n] = [("ResnetBlock2D", resnet + skip)]
        if n > 3:
            inputs[n].append(("Transformer2DModel", transformer(2 if n < 6 else 10)))
    inputs[3] = inputs[6] = [("Downsample2D", ["op"])]
    middle = [("ResnetBlock2D", resnet), ("Transformer2DModel", transformer(10)),
              ("ResnetBlock2D", resnet)]  # fmt: skip
    outputs = {}
    for n in range(len(channels)):
        outputs[n] = [("ResnetBlock2D", [*resnet, "skip_connection"])]
        if n < 6:
            outputs[n].append(("Transformer2DModel", transformer(10 if n < 3 else 2)))
        if n in (2, 5):
            outputs[n].append(("Upsample2D", ["conv"]))
    for place, blocks in (("input_blocks", inputs), ("output_blocks", outputs)):
        for n, parts in blocks.items():
            for i, (kind, layers) in enumerate(parts):
                yield f"{place}.{n}.{i}", kind, layers
    for i, (kind, layers) in enumerate(middle):
        yield f"middle_block.{i}", kind, layers
    yield "input_blocks.0.0", "Conv2d", [""]
    yield "time_embed", "Sequential", ["0", "2"]
    yield "label_emb.0", "Sequential", ["0", "2"]
    yield "out", "ModuleList", ["2"]


def transformer(depth):
    layers = [f"attn{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += ["ff.net.0.proj", "ff.net.2"]
    blocks = [f"transformer_blocks.{i}.{layer}" for i in range(depth) for layer in layers]
    return ["proj_in", *blocks, "proj_out"]


ORIGINAL = {f"{block}.{layer}".strip("."): kind for block, kind, layers in original_unet()
            for layer in layers}  # fmt: skip


# sd-scripts knows the layers below four classes, by their original name behind lora_unet.
CLASSES = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
SD_SCRIPTS = {f"lora_unet_{n.replace('.', '_')}" for n, kind in ORIGINAL.items() if kind in CLASSES}
A1111 = {f"diffusion_model_{name.replace('.', '_')}" for name in ORIGINAL}


def a1111_finds(name):
    """Diffusers' names by patterns, which misplace one upsampler; else lora_unet replaced."""
    parts = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
             "conv_shortcut": "skip_connection"}  # fmt: skip
    converted = name
    if m := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        way, i, kind, j, rest = m.groups()
        n = int(i) * 3 + int(j) + (way == "down")
        place = "input_blocks" if way == "down" else "output_blocks"
        rest = parts.get(rest, rest) if kind == "resnets" else rest
        converted = f"diffusion_model_{place}_{n}_{int(kind == 'attentions')}_{rest}"
    elif m := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, j, rest = m.groups()
        rest = parts.get(rest, rest) if kind == "resnets" else rest
        n = 1 if kind == "attentions" else 2 * int(j)
        converted = f"diffusion_model_middle_block_{n}_{rest}"
    elif m := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        converted = f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op"
    elif m := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        last = 2 if int(m[1]) > 0 else 1
        converted = f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{last}_conv"
    return converted in A1111 or name.replace("lora_unet", "diffusion_model") in A1111


def a1111_version(header):
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if header.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if header else "Unknown"


def comfyui_names(ours):
    """Original names behind lora_unet or dotted; diffusers' behind lora_unet, lycoris, or dotted.

    The last have attention as processors, so that PEFT naming misses it. ours: diffusers' names.
    Returns each name with its layer, by the original name.
    """
    names = {f"lora_unet_{layer.replace('.', '_')}": layer for layer in ORIGINAL}
    names |= {f"diffusion_model.{layer}": layer for layer in ORIGINAL}
    for name in ours:
        layer = comfyui_layer(name)
        names |= {f"{kind}_{name.replace('.', '_')}": layer for kind in ("lora_unet", "lycoris")}
        processor = name.replace(".to_", ".processor.to_")
        if processor.endswith(".to_out.0"):
            processor = processor.removesuffix(".0")
        names |= {processor: layer, f"unet.{processor}": layer}
    return names


RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
# The first two places of an embedding have no other name but these.
BASIC = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_in": "input_blocks.0.0", "conv_out": "out.2"}  # fmt: skip


def comfyui_layer(name):
    """A layer's original name by its place: unet_to_diffusers of ComfyUI's utils.py, inverted."""
    if name in BASIC:
        return BASIC[name]
    if m := re.match(r"mid_block\.(attentions|resnets)\.(\d)\.(.+)", name):
        kind, j, rest = m.groups()
        block = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(j)}"
        return f"{block}.{RESNET.get(rest, rest)}"
    way, i, kind, j, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    n = 3 * int(i) + int(j) + (way == "down")
    match kind:
        case "downsamplers":
            return f"input_blocks.{n + 2}.0.op"
        case "upsamplers":
            return f"output_blocks.{n + 2}.2.conv"
    place = "input_blocks" if way == "down" else "output_blocks"
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    return f"{place}.{n}.{int(kind == 'attentions')}.{rest}"


# What ComfyUI looks for below each of these names, in its order: weight_adapter/lora.py.
SUFFIXES = [(".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"),
            (".lora_B.weight", ".lora_A.weight"),
            (".lora.up.weight", ".lora.down.weight")]  # fmt: skip


def comfyui_loads(tensors, ours):
    """Layer -> its up and down matrix as ComfyUI takes them from a file, and the keys left over."""
    layers, used = {}, set()
    for name, layer in comfyui_names(ours).items():
        used |= {f"{name}.alpha"} & tensors.keys()
        for up, down in SUFFIXES:
            if name + up in tensors:
                layers[layer] = tensors[name + up], tensors[name + down]
                used |= {name + up, name + down}
                break
    return layers, tensors.keys() - used


TOLD = ("add_embedding.linear_1", "add_embedding.linear_2")


def tiny_matrices(base, more=TOLD):
    """A LoRA with the layers of one that is told K, or more, and matrices of next to nothing."""
    adapters = {}
    for name, layer in named_layers(base).items():
        if TARGET_MODULES.search(name) or name in more:
            kernel = layer.weight.shape[2:]
            adapters[name] = Adapter(
                torch.ones(1, 1, *kernel), torch.ones(1, 1, *[1] * len(kernel)), 1
            )
    return LoRA(adapters)


def test_every_layer_of_sdxl_has_the_name_that_programs_look_for(tmp_path):
    unet = build_on_meta(UNet, UNetConfig())
    ours = list(named_layers(unet))
    original = {n: keys.to_original_key(n, keys.unet_modules(UNetConfig())) for n in ours}
    assert {*original.values()} == set(ORIGINAL)
    assert original == {name: comfyui_layer(name) for name in ours}
    lora, path = tiny_matrices(unet), tmp_path / "lora_kohya.safetensors"
    write_kohya(path, lora)
    names = kohya_names(path)
    assert len(names) == len(lora.adapters) == 790
    assert all(map(a1111_finds, names))
    # What a student is told K by, sd-scripts has no LoRA for.
    assert names - SD_SCRIPTS == {"lora_unet_label_emb_0_0", "lora_unet_label_emb_0_2"}
    layers, left_over = comfyui_loads(load_file(path), ours)
    assert not left_over and layers.keys() == {comfyui_layer(name) for name in lora.adapters}
    # Diffusers itself, back to its own names.
    state, _ = StableDiffusionXLPipeline.lora_state_dict(
        path, unet_config=SimpleNamespace(layers_per_block=2)
    )
    loaded = {
        k.replace("_lora.", ".lora.").replace(".processor", "").split(".lora.")[0] for k in state
    }
    assert {k.replace("to_out", "to_out.0") for k in loaded} == {f"unet.{n}" for n in lora.adapters}
    # With diffusers' names, as this project wrote before, the same rules have the known gaps.
    before = [f"lora_unet_{name.replace('.', '_')}" for name in lora.adapters]
    assert not SD_SCRIPTS & set(before)
    missed = [name for name in before if not a1111_finds(name)]
    assert {*missed} == {"lora_unet_up_blocks_0_upsamplers_0_conv",
                         *(f"lora_unet_{name.replace('.', '_')}" for name in TOLD)}  # fmt: skip
    # Layers that the published LoRA leaves alone: sd-scripts has no name for them.
    write_kohya(path, tiny_matrices(unet, ours))
    rest = kohya_names(path) - names
    assert len(rest) == 4 and rest <= comfyui_names(ours).keys() and all(map(a1111_finds, rest))


def test_comfyui_reads_every_layer_in_diffusers_naming(tmp_path):
    """Each matrix goes to its layer and no key is left over; in PEFT naming attention would be."""
    unet = build_on_meta(UNet, UNetConfig())
    ours, path = list(named_layers(unet)), tmp_path / "lora.safetensors"
    lora = tiny_matrices(unet)
    for i, adapter in enumerate(lora.adapters.values()):
        adapter.up.data.fill_(i)
        adapter.down.data.fill_(-i)
    write_diffusers(path, lora)
    layers, left_over = comfyui_loads(load_file(path), ours)
    assert not left_over and len(layers) == 790
    for i, name in enumerate(lora.adapters):
        up, down = layers[comfyui_layer(name)]
        assert (up.unique().item(), down.unique().item()) == (i, -i)
    in_peft_naming = {}
    for name, adapter in lora.adapters.items():
        in_peft_naming[f"unet.{name}.lora_A.weight"] = adapter.down
        in_peft_naming[f"unet.{name}.lora_B.weight"] = adapter.up
    layers, left_over = comfyui_loads(in_peft_naming, ours)
    assert len(layers) == 790 - 8 * 70 and len(left_over) == 2 * 8 * 70


def test_kohya_header_is_what_programs_go_by(tmp_path):
    def header(lora, **more):
        write_kohya(tmp_path / "fox.safetensors", lora, **more)
        with safe_open(tmp_path / "fox.safetensors", "pt") as file:
            return file.metadata()

    lora = LoRA({"conv_in": Adapter(torch.ones(4, 1, 3, 3), torch.ones(1, 4, 1, 1), 4)})
    got = header(lora, tdd_K="4-8", tdd_method="tdd")
    assert a1111_version(got) == "SDXL" and a1111_version({"tdd_K": "4-8"}) == "SD1"
    assert (got["ss_network_module"], got["ss_network_dim"], got["ss_network_alpha"]) == (
        "networks.lora", "4", "4")  # fmt: skip
    assert got["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (got["modelspec.title"], got["modelspec.prediction_type"]) == ("TDD LoRA", "epsilon")
    assert got["tdd_K"] == "4-8" and "modelspec.resolution" not in got
    assert header(lora, tdd_resolution="512")["modelspec.resolution"] == "512x512"
    lora.adapters["mid_block.attentions.0.proj_in"] = Adapter(torch.ones(2, 1), torch.ones(1, 2), 2)
    got = header(lora)
    assert (got["ss_network_dim"], got["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_merged_as_sd_scripts_does_it_is_the_same_model(folder, single, model, tmp_path):
    """Into a single file: W + up @ down * alpha / dim, for 3x3 convolutions by a convolution."""
    lora = LoRA.init(model.unet, 4, 2, torch.Generator().manual_seed(0))
    for adapter in lora.adapters.values():
        adapter.up.data = (
            torch.randn(adapter.up.shape, generator=torch.Generator().manual_seed(1)) / 9
        )
    write_kohya(tmp_path / "lora.safetensors", lora)
    state, merged = load_file(tmp_path / "lora.safetensors"), load_file(single)
    spelled = {"lora_unet_" + k.removeprefix(keys.UNET).removesuffix(".weight").replace(".", "_"): k
               for k in merged if k.startswith(keys.UNET)}  # fmt: skip
    for key, down in state.items():
        if key.endswith(".lora_down.weight"):
            name = key.split(".")[0]
            up, scale = state[f"{name}.lora_up.weight"], state[f"{name}.alpha"] / len(down)
            change = up.flatten(1) @ down.flatten(1)
            if down.shape[2:] == (3, 3):
                change = torch.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
            merged[spelled[name]] += change.reshape(merged[spelled[name]].shape) * scale
    save_file(merged, tmp_path / "model.safetensors")
    merged = load.load_sdxl(tmp_path / "model.safetensors", folder / "tokenizer")
    plain = model.unet(*inputs())
    add_adapter(model.unet, "one", lora)
    with active_adapters(model.unet, one=1.0):
        assert close(merged.unet(*inputs()), model.unet(*inputs()), 1e-5)
    assert not close(merged.unet(*inputs()), plain, 1e-2)


# ---------------------------------------------------------------------------------- other spellings


def in_spelling(kind, name):
    original = keys.to_original_key(name, keys.unet_modules(UNetConfig()))
    return {
        "sgm": f"unet.{original}", "comfyui": f"diffusion_model.{original}", "bare": original,
        "checkpoint": f"model.diffusion_model.{original}", "diffusers in comfyui's":
        f"diffusion_model.{name}", "simpletuner": f"lycoris_{name.replace('.', '_')}",
        "component first": f"unet.base_model.model.{name}",
        "component last": f"base_model.model.unet.{name}", "bare diffusers": name,
    }[kind]  # fmt: skip


SPELLINGS = ["sgm", "comfyui", "bare", "checkpoint", "diffusers in comfyui's", "simpletuner",
             "component first", "component last", "bare diffusers"]  # fmt: skip


@pytest.mark.parametrize("suffixes", [("lora_A", "lora_B"), ("lora_down", "lora_up"),
                                      ("lora_A.default", "lora_B.default")])  # fmt: skip
@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings_of_the_unet(kind, suffixes, tiny, tmp_path):
    path, lora = tmp_path / "lora.safetensors", LoRA.init(tiny.unet, 4, 2, torch.Generator())
    tensors = {}
    for name, adapter in lora.adapters.items():
        spelled = in_spelling(kind, name)
        tensors[f"{spelled}.{suffixes[0]}.weight"] = adapter.down
        tensors[f"{spelled}.{suffixes[1]}.weight"] = adapter.up
    save_file(tensors, path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    got = read(path, tiny)[0].adapters
    assert got.keys() == lora.adapters.keys()
    assert all(torch.equal(got[name].down, adapter.down) for name, adapter in lora.adapters.items())
    # Only PEFT's own files have their settings beside them.
    assert {adapter.scale for adapter in got.values()} == {0.5 if "component" in kind else 1.0}


@pytest.mark.parametrize("i", [1, 2])
def test_spellings_of_the_text_encoders(i, tiny, tmp_path):
    component, clip = ("text_encoder", "clip_l") if i == 1 else ("text_encoder_2", "clip_g")
    layer = "encoder.layers.0.self_attn.q_proj"
    for name in (f"text_encoders.{clip}.transformer.text_model.{layer}", f"{component}.{layer}",
                 f"base_model.model.{component}.text_model.{layer}",
                 f"{component}.base_model.model.text_model.{layer}",
                 f"lora_te{i}_text_model_{layer.replace('.', '_')}"):  # fmt: skip
        tensors = {f"{name}.lora_down.weight": torch.ones(2, 64),
                   f"{name}.lora_up.weight": torch.ones(64, 2)}  # fmt: skip
        save_file(tensors, tmp_path / "lora.safetensors")
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}')
        loras = read(tmp_path / "lora.safetensors", tiny)
        assert [len(lora.adapters) for lora in loras] == [0, int(i == 1), int(i == 2)]
        assert f"text_model.{layer}" in loras[i].adapters


def test_one_unets_adapter_as_diffusers_saves_it(folder, model, tmp_path):
    """save_lora_adapter: neither keys nor settings name the component; alpha is not the rank."""
    unet = peft_unet(folder, rank=4, alpha=2)
    unet.save_lora_adapter(tmp_path)
    merge(model.unet, [(read(tmp_path, model)[0], 1.0)])
    assert close(model.unet(*inputs()), theirs(unet), 1e-5)


def test_folders(tiny, tmp_path):
    """Of three files in a folder, the one with PEFT's name; of two without, none."""
    with pytest.raises(ValueError, match="is a folder with 0"):
        read(tmp_path, tiny)
    save_file(GOOD, tmp_path / "fox.safetensors")
    assert len(read(tmp_path, tiny)[0].adapters) == 1
    save_file({k: v * NAN for k, v in GOOD.items()}, tmp_path / "hen.safetensors")
    with pytest.raises(ValueError, match="is a folder with 2"):
        read(tmp_path, tiny)
    save_file({k: 3 * v for k, v in GOOD.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    (adapter,) = read(tmp_path, tiny)[0].adapters.values()
    assert adapter.down.unique().tolist() == [3.0]
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (adapter,) = read(tmp_path, tiny)[0].adapters.values()
    assert adapter.down.unique().tolist() == [3.0]


# ------------------------------------------------------------------------------------ PEFT's starts

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def trained(folder, start, rslora=False, rank=4, alpha=2, targets=LINEAR):
    """Diffusers' UNet with an adapter of PEFT's that began this way and was trained a little."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=rslora,
                        init_lora_weights=start, rank_pattern={"to_q": 6})  # fmt: skip
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    for key, p in unet.named_parameters():
        if ".default." in key:
            p.data += 0.1 * p.data.std().clamp(min=0.1) * torch.randn(p.shape, generator=generator)
    return unet.requires_grad_(False), config


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "mica", "gaussian", "eva", True])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_of_peft(start, rslora, folder, model, tmp_path):
    unet, config = trained(folder, start, rslora)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
    )
    plain, lora = model.unet(*inputs()), read(tmp_path, model)[0]
    merge(model.unet, [(lora, 1.0)])
    assert close(model.unet(*inputs()), theirs(unet), 2e-5)
    assert not close(plain, theirs(unet), 1e-2)
    if start in ("pissa", "olora"):
        assert {len(adapter.down) for adapter in lora.adapters.values()} == {8, 12}
        # PEFT's two factors are as large as W; those of the difference are as small as it is.
        base = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        for name, adapter in lora.adapters.items():
            product = adapter.up.norm() * adapter.down.norm()
            assert product < base[f"{name}.weight"].norm()


def test_a_folder_that_peft_saved_after_pissa(folder, model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights="pissa")
    wrapped = get_peft_model(UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    for key, p in wrapped.named_parameters():
        if "lora_" in key:
            p.data += 0.02 * torch.randn(p.shape)
    wrapped.save_pretrained(tmp_path)
    merge(model.unet, [(read(tmp_path, model)[0], 1.0)])
    assert close(model.unet(*inputs()), theirs(wrapped.base_model.model), 2e-5)


STARTS = [("corda", "corda"), ("lora_ga", "lora_ga"), ("pissa_niter_16", "pissa_niter_16"),
          ("loftq", "loftq.*quantised base"), ("brand_new", "brand_new"), (7, "7"),
          ([1], "a list")]  # fmt: skip


@pytest.mark.parametrize(("start", "words"), STARTS)
def test_starts_that_cannot_be_undone(start, words, tiny, tmp_path):
    content = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start}
    message = refusal(tiny, tmp_path, header={"lora_adapter_metadata": json.dumps(content)})
    assert re.search(f"began as .*{words}", message)
    assert ("path_initial_model_for_weight_conversion" in message) == (start != "loftq")


def test_what_pissa_is_not_undone_in(folder, tiny, tmp_path):
    content = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}
    header = {"lora_adapter_metadata": json.dumps(content)}
    assert "--dtype float32" in refusal(
        load.load_sdxl(folder, dtype=torch.float16), tmp_path, {}, header
    )
    conv = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
            "unet.conv_in.lora_B.weight": torch.ones(64, 2, 1, 1)}  # fmt: skip
    assert "convolution" in refusal(tiny, tmp_path, conv, header)


# -------------------------------------------------------------------------------- what is no LoRA

LAYER = "unet.down_blocks.1.attentions.0.proj_in"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 128), f"{LAYER}.lora_B.weight": torch.ones(128, 2)}


def refusal(model, folder, tensors=None, header=None):
    """The one line that a file is refused with."""
    path = folder / "bad.safetensors"
    save_file({**GOOD, **(tensors or {})}, path, header)
    with pytest.raises(ValueError) as error:
        read(path, model)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 500
    return message.removeprefix(str(path))


KINDS = {
    "DoRA": [f"{LAYER}.lora_magnitude_vector", "lora_unet_x.dora_scale"],
    "LoHa": ["lora_unet_x.hada_w1_a"], "LoKr": ["lora_unet_x.lokr_w1"],
    "OFT": ["oft_unet_x.oft_blocks", f"{LAYER}.oft_R.weight", f"{LAYER}.boft_R"],
    r"\(IA\)\^3": [f"{LAYER}.ia3_l", "lora_unet_x.on_input"], "GLoRA": ["lora_unet_x.a1.weight"],
    "Tucker": ["lora_unet_x.lora_mid.weight"],
    r"\.diff": ["lora_unet_x.diff", "lora_unet_x.diff_b"],
    "normalisation": ["lora_unet_x.w_norm"],
    "bundle_emb": ["bundle_emb.fox.string_to_param.*"], "quantised": [f"{LAYER}.scale_weight"],
    "biases": [f"{LAYER}.lora_B.bias"], "embedding": ["clip_g"],
    "IP-Adapter": ["image_proj.norm.bias"],
    "ControlNet": ["lora_controlnet"], "--model": ["model.diffusion_model.out.2.weight"],
    "--unet": ["conv_in.weight"], "--vae": ["decoder.conv_in.weight"],
    "whole layers": ["unet.conv_in.modules_to_save.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_named(kind, tiny, tmp_path):
    for key in KINDS[kind]:
        message = refusal(tiny, tmp_path, {key: torch.ones(1)})
        assert re.search(f" is .*{kind}.*only plain LoRAs are read", message) and key in message


HEADERS = [
    ("ss_base_model_version", "sd_v1", "another model"),
    ("ss_base_model_version", "sd3m", "another model"),
    ("ss_base_model_version", "flux1", "another model"),
    ("modelspec.architecture", "stable-diffusion-v2-768-v/lora", "another model"),
    ("modelspec.architecture", "stable-diffusion-xl-v1-refiner/lora", "another model"),
    ("modelspec.architecture", "flux-1-dev/lora", "another model"),
    ("modelspec.prediction_type", "v", "v-prediction"), ("ss_v2", "True", "v-prediction"),
    ("modelspec.predict_key", "V", "v-prediction"),
    ("ss_v_parameterization", "True", "v-prediction"),
    ("told", "s", "lost the embedding"), ("told", "nonsense", "lost the embedding"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "value", "words"), HEADERS)
def test_headers_of_other_models(entry, value, words, tiny, tmp_path):
    message = refusal(tiny, tmp_path, header={entry: value})
    assert words in message
    assert entry == "told" or entry in message


def test_what_told_k_in_other_ways_is_refused(tiny, tmp_path):
    """An earlier version's embedding of K, and a file whose header is told K without its layer."""
    embedding = {"unet.told.linear_1.weight": torch.ones(256, 64)}
    message = refusal(tiny, tmp_path, embedding, {"told": "K"})
    assert message == (" has an embedding of K of an earlier version: K is told as a crop since: "
                       "train it again")  # fmt: skip
    message = refusal(tiny, tmp_path, header={"tdd_told_ks": "[4, 8]"})
    assert "has lost the layer" in message


def test_headers_of_sdxl_pass(tiny, tmp_path):
    for header in ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False",
                    "ss_zero_terminal_snr": "True", "modelspec.prediction_type": "epsilon",
                    "modelspec.predict_key": "Epsilon", "ss_sd_model_name": "sd3-look.safetensors",
                    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
                   {"ss_base_model_version": "pony", "ss_v_parameterization": "None"},
                   {"ss_base_model_version": "sdxl_1.0",
                    "modelspec.prediction_type": ""}):  # fmt: skip
        save_file(GOOD, tmp_path / "good.safetensors", header)
        assert len(read(tmp_path / "good.safetensors", tiny)[0].adapters) == 1


FAMILIES = {
    "Stable Diffusion 1": ["lora_te_text_model_encoder_layers_0_mlp_fc1",
                           "lora_unet_down_blocks_0_attentions_0_proj_in",
                           "unet.up_blocks.3.attentions.0.proj_in",
                           "lora_unet_input_blocks_1_1_proj_in"],
    "a diffusion transformer": [
        "lora_unet_double_blocks_0_img_attn_proj", "diffusion_model.blocks.0.cross_attn.k",
        "transformer.single_transformer_blocks.0.attn.to_q", "lora_te3_encoder_block_0",
        "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.joint_blocks.0.x",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_named(family, tiny, tmp_path):
    for key in FAMILIES[family]:
        message = refusal(tiny, tmp_path, {f"{key}.lora_down.weight": torch.ones(2, 8)})
        assert re.search(f"no LoRA for this model but for .*{family}", message), message
    # SDXL's own layers are no sign of another family.
    odd = {"unet.mid_block.attentions.0.transformer_blocks.0.x.lora_A.weight": torch.ones(2, 8)}
    assert "no LoRA for this model: 1 keys that fit nothing" in refusal(tiny, tmp_path, odd)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = {
        f"{layer}.lora_A.weight": torch.ones(2, 768),
        f"{layer}.lora_B.weight": torch.ones(128, 2),
    }
    assert "(2, 768), its layer (128, 128): a LoRA for" in refusal(tiny, tmp_path, wide)


def with_alpha(alpha):
    return {f"{LAYER}.alpha": alpha}


A, B = GOOD
NAN, INF = float("nan"), float("inf")
BAD = [
    ({A: torch.full((2, 128), NAN)}, f"tensor {A} holds NaN"),
    ({B: torch.full((128, 2), INF)}, f"tensor {B} holds NaN or infinity"),
    ({B: torch.full((128, 2), NAN).to(torch.float8_e4m3fn)}, f"tensor {B} holds NaN"),
    (with_alpha(torch.tensor(NAN)), "alpha holds NaN"),
    (with_alpha(torch.tensor(-INF)), "infinity"),
    (with_alpha(torch.ones(0)), "its alpha"),
    (with_alpha(torch.ones(2)), r"its alpha is of shape \(2,\)"),
    (with_alpha(torch.zeros(())), "its alpha is 0.0, not one number"),
    (with_alpha(torch.tensor(True)), "alpha is True"),
    (with_alpha(torch.ones((), dtype=torch.complex64)), "its alpha"),
    ({A: torch.ones(0, 128), B: torch.ones(128, 0)}, "another model"),
    ({A: torch.ones(())}, "another model"), ({B: torch.ones(128)}, "another model"),
    ({A: torch.ones(2, 128, 3, 3)}, "another model"), ({A: torch.ones(3, 128)}, "another model"),
    ({A: torch.ones(2, 128, dtype=torch.int8)}, "torch.int8: quantised"),
    ({B: torch.ones(128, 2, dtype=torch.complex64)}, "complex64"),
    ({f"lora_{LAYER.replace('.', '_')}.lora_down.weight": torch.ones(2, 128)}, "proj_in twice"),
    ({"unet.conv_in.alpha": torch.ones(())}, "up or a down matrix only"),
    ({"unet.told.linear_1.weight": torch.ones(1)}, "does not say of what"),
    ({"x" * 10**5: torch.ones(1)}, "is no layer's name"),
    ({"lora\nunet": torch.ones(1)}, "is no layer's name"),
    ({"": torch.ones(1)}, "keys that fit nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), BAD)
def test_numbers_that_are_none(tensors, words, tiny, tmp_path):
    assert re.search(words, refusal(tiny, tmp_path, tensors))


def test_other_precisions(tiny, tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float64):
        values = (torch.randn(2, 128).to(dtype), torch.randn(128, 2).to(dtype))
        save_file(
            {A: values[0], B: values[1], **with_alpha(torch.tensor(1))}, tmp_path / "x.safetensors"
        )
        (adapter,) = read(tmp_path / "x.safetensors", tiny)[0].adapters.values()
        assert adapter.scale == 0.5 and adapter.up.dtype == torch.float32
        assert torch.equal(adapter.down, values[0].float())


# ------------------------------------------------------------------------------- damaged settings

VALUES = [None, True, False, 0, -1, 1, 3, 10**400, 0.5, 1e308, NAN, -INF, "", "4", "x" * 10**5, [],
          [1], {}, {"a": 1}, {"to_q": 1}, {"(": 2}, {"(a+)+b": 2}, {"(.*)*(.*)*proj": 2}, {"": 2},
          {"a?" * 40 + "a" * 40: 2}, {"(a|a)" * 40: 2}, {".*.*.*proj_in": 2}, {"proj_in": "2"},
          {"proj_in": True}, {"proj_in": 0}, {"proj_in": NAN}, {"proj_in": 5}, {"[": 1},
          [[[[]]]], {"a": {"b": {"c": []}}}]  # fmt: skip


USED = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
        "peft_type", "use_dora"]  # fmt: skip


def scaling_by_peft(content, name, rank):
    """alpha / r as PEFT's own configuration and layers compute it."""
    settings = {k.removeprefix("unet."): v for k, v in content.items()}
    config = LoraConfig(**{name: settings[name] for name in USED if name in settings})
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(pattern, name), config.lora_alpha)
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def test_damaged_settings_are_refused_in_one_line_or_mean_what_peft_means(tiny, tmp_path):
    """240 headers with values of every type in every place, in a few seconds."""
    original = {
        f"unet.{k}": v
        for k, v in LoraConfig(r=2, lora_alpha=1, target_modules=ALL).to_dict().items()
    }
    original = json.loads(json.dumps(original, default=list))
    rng, path = random.Random(0), tmp_path / "lora.safetensors"
    name, loaded, start = LAYER.removeprefix("unet."), 0, time.monotonic()
    cases = [(f"unet.{k}", value) for k in USED for value in VALUES]
    cases += [(rng.choice(list(original)), rng.choice(VALUES)) for _ in range(60)]
    for entry, value in rng.sample(cases, 240):
        content = {**original, entry: value}
        if rng.random() < 0.2:
            del content[rng.choice(list(content))]
        save_file(GOOD, path, {"lora_adapter_metadata": json.dumps(content)})
        try:
            adapter = read(path, tiny)[0].adapters[name]
        except ValueError as problem:
            assert str(problem).startswith(str(path)) and "\n" not in str(problem)
            assert len(str(problem)) < 500
        else:
            loaded += 1
            assert adapter.scale == pytest.approx(scaling_by_peft(content, name, 2)), (entry, value)
    assert 20 < loaded < 200
    assert time.monotonic() - start < 20


PATTERNS = [{"to_q": 1, "b.to_q": 2}, {"b.to_q": 2, "to_q": 1}, {"^to_q": 3}, {"^b.to_q": 3},
            {"a.*to_q": 4}, {"o_q": 5}, {"c.a.to_q": 6, ".*a.to_q": 7}, {}]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_name_the_layers_that_peft_takes_them_for(pattern):
    """The end of a name or all of it, the first that matches; without a number it is PEFT's 8."""
    names = ["to_q", "a.to_q", "b.to_q", "c.a.to_q", "c.b.to_q", "a.x.to_q"]
    content = {"peft_type": "LORA", "alpha_pattern": pattern}
    alphas, start = parse_settings("x", content, dict.fromkeys(names, 8))
    expected = {name: pattern.get(get_pattern_key(pattern, name), 8) for name in names}
    assert (alphas, start) == (expected, "")


def test_damaged_json_and_a_broken_config_beside(tiny, tmp_path):
    for text in ("[" * 10**5, '{"unet.r": ' + "9" * 5000 + "}", "{", "7", '"x"', "nul", ""):
        assert "is broken" in refusal(tiny, tmp_path, header={"lora_adapter_metadata": text})
    assert "of other parts" in refusal(
        tiny, tmp_path, header={"lora_adapter_metadata": '{"transformer.r": 2}'}
    )
    raw = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in GOOD.items()}
    save_file(raw, tmp_path / "adapter_model.safetensors")
    for content, words in [
        ({"peft_type": "LOHA"}, "'LOHA'"), ({"use_dora": True, "r": 2}, "use_dora"),
        ({"r": 4}, "says 4"),
        ({"r": 2, "lora_alpha": "8"}, "'8', not a finite"),
        ({"r": 2, "use_rslora": 1}, "not of type bool"),
        ({"r": 2, "kasa_config": {"x": 1}}, "kasa_config"),
        ({"r": 2, "rank_pattern": [1]}, "a list, not of type dict"),
    ]:  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "adapter_model.safetensors", tiny)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    assert read(tmp_path / "adapter_model.safetensors", tiny)[0].adapters[LAYER[5:]].scale == 0.5


def test_many_patterns_take_no_time(tmp_path):
    """Headers with a pattern for each of SDXL's 788 layers, as different ranks give them."""
    unet, path = build_on_meta(UNet, UNetConfig()), tmp_path / "lora.safetensors"
    adapters = {}
    for i, (name, layer) in enumerate(named_layers(unet).items()):
        out, *fan_in = layer.weight.shape
        up = torch.zeros([out, i % 3 + 1] + [1] * (len(fan_in) - 1))
        adapters[name] = Adapter(torch.zeros(i % 3 + 1, *fan_in), up, 1)
    write_diffusers(path, LoRA(adapters))
    start = time.monotonic()
    got = read_lora(path, unet, torch.nn.Module(), torch.nn.Module())[0].adapters
    assert {len(adapter.down) for adapter in got.values()} == {1, 2, 3}
    assert {adapter.scale for adapter in got.values()} == {1.0}
    assert time.monotonic() - start < 10
