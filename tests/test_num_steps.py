"""Telling a student K as crop_top = 8 K: its start, its training, its files here and elsewhere."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_sdxl
from sdxl import load, num_steps
from sdxl.controlnet import ControlNet
from sdxl.lora import active_adapters, add_adapter
from sdxl.lora_files import export_for_one_K, read_lora, write_diffusers
from sdxl.pipeline import null_condition
from sdxl.recipe import read_recipe
from tests.helpers import run
from tests.oracles import (
    UNET,
    Reference,
    busy,
    close,
    euler_pipeline,
    example,
    ours,
    randomise,
    run_sample,
)
from tests.test_lora_files import comfyui_layer, comfyui_loads
from training import build
from training.build import DistillConfig
from training.export import export
from unet import UNet

KS = (4, 5, 6, 7, 8)
# The tiny SDXL with as many sinusoids of a size as SDXL has.
WIDE = UNET | {
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 48,
}
TIMES = {2: [999, 499], 4: [999, 751, 499, 251], 8: [999, 875, 751, 627, 499, 375, 251, 127]}
PROMPT = "a red fox"
NO_ENCODERS = torch.nn.Module(), torch.nn.Module()  # for LoRAs of the UNet alone


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """The tiny SDXL on disk, with wide sinusoids."""
    root = tmp_path_factory.mktemp("wide") / "sdxl"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("unet"))
    randomise(UNet2DConditionModel(**WIDE), 0).save_pretrained(root / "unet")
    return root


def settings(method="tdd", **more):
    """Of a small student that is told K; alpha is half its rank."""
    return DistillConfig(method, **{"Ks": KS, "rank": 8, "alpha": 4.0, "eta": 0.0, **more})


@pytest.fixture(scope="module")
def student(wide, tmp_path_factory):
    """The folder of a told student's files, every weight of it off its start."""
    return export_student(settings(), wide, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def unify(wide, tmp_path_factory):
    """The same of TDM, for K = 1, 2 and 4."""
    return export_student(settings("tdm", Ks=(1, 2, 4)), wide, tmp_path_factory.mktemp("unify"))


def export_student(config, wide, output):
    step = build.build_step(config, load.load_sdxl(wide).unet, "cpu")
    generator = torch.Generator().manual_seed(3)
    for p in step.student.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    export(config, wide, 64, step, output, 3, {})
    return output


def crop(cond, top):
    """The condition with the crop (top, 0), a number or one for each example."""
    time_ids = torch.tensor([[64, 80, 0, 0, 64, 64]]).repeat(len(cond["pooled"]), 1)
    time_ids[:, 2] = torch.as_tensor(top)
    return {**cond, "time_ids": time_ids}


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# ----------------------------------------------------------------------------------- the reader


@pytest.mark.parametrize("width", [256, 32])
@pytest.mark.parametrize("Ks", [tuple(range(1, 9)), KS, (4,), (8, 2)])
def test_the_reader_makes_a_one_hot_code_of_k(Ks, width):
    """Of diffusers' own sinusoids, in float32 and bf16; crop_top = 0 is all zeros."""
    crops = torch.tensor([8 * K for K in (0, *Ks)])
    s = get_timestep_embedding(crops, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    rows = num_steps.reader(Ks, width)
    expected = torch.cat([torch.zeros(1, len(Ks)), torch.eye(len(Ks))])
    assert (s @ rows.T - expected).abs().max() <= 1e-5
    half = torch.nn.functional.linear(s.bfloat16(), rows.bfloat16()).float()
    assert (half - expected).abs().max() <= 3e-3


def test_too_few_sinusoids_are_refused(folder):
    with pytest.raises(ValueError, match=r"^8 sinusoids of the crop do not tell K of \[1, 2, 3, "):
        num_steps.reader(tuple(range(1, 9)), 8)
    with pytest.raises(ValueError, match="4 sinusoids"):
        num_steps.reader(KS, 4)
    # In float64 they could be told apart, in half precision by rows of great and opposite numbers.
    num_steps.reader(tuple(range(1, 11)), 32)
    for Ks in (range(1, 13), range(4, 17), range(1, 21)):
        with pytest.raises(ValueError, match=r"^32 sinusoids"):
            num_steps.reader(tuple(Ks), 32)
    unet = load.load_sdxl(folder).unet
    with pytest.raises(ValueError, match="8 sinusoids"):
        build.build_step(settings(Ks=tuple(range(1, 9))), unet, "cpu")
    with pytest.raises(ValueError, match="rank of 4 is too low to tell 5 K: give --rank 5"):
        build.build_step(settings(rank=4), unet, "cpu")


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["tdd", "tdm"])
@torch.no_grad()
def test_a_fresh_student_is_its_teacher_for_every_k(method, wide):
    """The base itself moves by a percent with that crop; told K, neither student nor fake do."""
    step = build.build_step(settings(method), load.load_sdxl(wide).unet, "cpu")
    x_t, cond = example(2, torch.float32)
    t = torch.tensor([999, 499])
    teacher = step.teacher(x_t, t, crop(cond, 0))
    told_networks = [step.student] if method == "tdd" else [step.student, step.fake]
    for K in KS:
        # cond itself has other crops, which the student must not see.
        for network in told_networks:
            assert close(num_steps.with_k(network, K)(x_t, t, cond), teacher, 1e-5), K
        assert not close(step.teacher(x_t, t, crop(cond, 8 * K)), teacher, 5e-3), K
    assert torch.equal(
        num_steps.with_k(step.student, 0)(x_t, t, cond), step.student(x_t, t, crop(cond, 0))
    )


@pytest.mark.parametrize("method", ["tdd", "tdm"])
def test_only_the_vector_of_the_k_in_use_learns(method, wide):
    """Its gradient is the sum of those of linear_1's outputs; the reader has none."""
    unet = load.load_sdxl(wide).unet
    step = build.build_step(settings(method, solver_steps=50), unet, "cpu")
    outputs = []

    def keep(_, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            outputs.append(output)

    x_0, cond = example(3, torch.float32)
    drawn = step.sample(x_0.shape, torch.Generator().manual_seed(0), "cpu")
    if method == "tdd":
        K = torch.tensor([8, 5, 5])
        drawn = dataclasses.replace(drawn, step=dataclasses.replace(drawn.step, K=K))
    else:
        K = torch.tensor([drawn.K] * 3)
    layer = unet.get_submodule(num_steps.LINEAR_1)
    handle = layer.register_forward_hook(keep)
    step.losses(x_0, cond, null_condition(cond), drawn)["loss"].backward()
    handle.remove()
    adapter = step.lora.adapters[num_steps.LINEAR_1]
    expected = torch.zeros_like(adapter.up)
    for output in outputs:
        if output.grad is not None:
            for row, gradient in zip(K.tolist(), output.grad, strict=True):
                expected[:, KS.index(row)] += gradient
    assert expected.abs().max() > 0
    assert close(adapter.up.grad, expected, 1e-4)
    assert adapter.down.grad is None and not adapter.down.requires_grad
    # Beside it: the layer behind it learns as any other does.
    assert step.lora.adapters[num_steps.LINEAR_2].up.grad.abs().max() > 0


@pytest.mark.parametrize("method", ["tdd", "tdm"])
def test_vectors_have_a_rate_of_their_own_and_no_decay(method, wide):
    """AdamW's first step moves a number by its rate, and decays it before by rate times decay.

    The fake score's rate for a vector is to the student's as its other rates are.
    """
    rates = {"lr": 1e-3, "fake_lr": 3e-3, "k_lr": 0.05}
    config = settings(method, weight_decay=0.5, **rates)
    step = build.build_step(config, load.load_sdxl(wide).unet, "cpu")
    optimizers = build.build_optimizers(config, step)
    loras = {"adam": (step.lora, rates["lr"], rates["k_lr"])}
    if method == "tdm":
        loras["adam_fake"] = step.fake_lora, rates["fake_lr"], 3 * rates["k_lr"]
    assert optimizers.keys() == loras.keys()
    for name, (lora, lr, k_lr) in loras.items():
        optimizer = optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in parameters} == {id(p) for p in lora.parameters()}
        assert len(parameters) == 2 * len(lora.adapters) - 1  # all matrices but the reader
        before = {key: tensor.clone() for key, tensor in lora.state_dict().items()}
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for key, tensor in lora.state_dict().items():
            expected = (1 - 0.5 * lr) * before[key] - lr
            if key == "add_embedding/linear_1.up":
                expected = before[key] - k_lr
            elif key == "add_embedding/linear_1.down":
                expected = before[key]
            assert torch.allclose(tensor, expected, atol=1e-6), key


# --------------------------------------------------------------------------------- in diffusers


def in_diffusers(wide, path, caplog):
    """Diffusers' pipeline with a LoRA, which it must load in silence and whole."""
    pipeline = euler_pipeline(wide)
    caplog.clear()
    pipeline.load_lora_weights(path)
    lines = [record.getMessage() for record in caplog.records]
    # The text encoders have no LoRA.
    assert [line for line in lines if "No LoRA keys associated to" not in line] == []
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    lora, *_ = read_lora(path, load.load_sdxl(wide).unet, *NO_ENCODERS)
    assert len(state) == 2 * len(lora.adapters)
    for name, adapter in lora.adapters.items():
        layer = pipeline.unet.get_submodule(name)
        product = layer.scaling["default_0"] * state[f"{name}.lora_B.weight"].flatten(1)
        product = product @ state[f"{name}.lora_A.weight"].flatten(1)
        mine = adapter.scale * adapter.up.flatten(1) @ adapter.down.flatten(1)
        assert close(product, mine, 1e-6), name
    return pipeline


def their_latents(pipeline, wide, steps, cfg, **crop):
    tokens, pooled = Reference(wide).encode(PROMPT)
    return pipeline(
        prompt_embeds=tokens, pooled_prompt_embeds=pooled, guidance_scale=cfg,
        negative_prompt_embeds=0 * tokens, negative_pooled_prompt_embeds=0 * pooled,
        height=64, width=72, generator=[torch.Generator().manual_seed(0)],
        output_type="latent", timesteps=TIMES[steps], **crop,
    ).images  # fmt: skip


@pytest.fixture
def here(wide, monkeypatch, capsys, tmp_path):
    """sample.py's latents for a LoRA, by deterministic steps."""

    def latents(path, steps, cfg, *words):
        words = ["--lora", path, "--steps", steps, "--cfg", cfg, "--gamma", 0, *words]
        return ours(monkeypatch, capsys, wide, tmp_path, "--prompt", PROMPT, *words)

    return latents


@pytest.mark.parametrize("name", ["lora.safetensors", "lora_kohya.safetensors"])
def test_told_k_it_samples_the_same_in_diffusers(name, student, wide, here, caplog):
    """crops_coords_top_left=(8 * K, 0), for two K, with guidance and without."""
    pipeline = in_diffusers(wide, student / name, caplog)
    for K in (4, 8):
        for cfg in (1, 2):
            expected = here(student / name, K, cfg)
            found = their_latents(pipeline, wide, K, cfg, crops_coords_top_left=(8 * K, 0))
            assert close(found, expected, 1e-5), (K, cfg)
    # Another K, or none, is another student.
    for top in (0, 32):
        found = their_latents(pipeline, wide, 8, 2, crops_coords_top_left=(top, 0))
        assert not close(found, expected, 1e-2), top


def test_tdms_student_samples_the_same_in_diffusers(unify, wide, here, tmp_path, caplog):
    """Told K, and as a file for one K."""
    path, unet = unify / "lora.safetensors", load.load_sdxl(wide).unet
    pipeline = in_diffusers(wide, path, caplog)
    expected = {K: here(path, K, 1) for K in (2, 4)}
    for K in expected:
        found = their_latents(pipeline, wide, K, 1, crops_coords_top_left=(8 * K, 0))
        assert close(found, expected[K], 1e-5), K
    assert not close(here(path, 4, 1, "--tell-k", 2), expected[4], 1e-2)
    one, _ = export_for_one_K(path, 4, unet, tmp_path / "one.safetensors")
    pipeline = in_diffusers(wide, one, caplog)
    assert close(their_latents(pipeline, wide, 4, 1), expected[4], 1e-5)


def test_tell_k_overrides(student, wide, here, caplog):
    """Fig. 10 of TDM: any K for any number of steps."""
    path = student / "lora.safetensors"
    pipeline = in_diffusers(wide, path, caplog)
    for words, K in ((["--tell-k", 8], 8), (["--tell-k", 5], 5), ([], 4)):
        found = their_latents(pipeline, wide, 4, 2, crops_coords_top_left=(8 * K, 0))
        assert close(here(path, 4, 2, *words), found, 1e-5), K
    assert not close(here(path, 4, 2, "--tell-k", 8), found, 1e-2)


@torch.no_grad()
def test_merged_as_comfyui_does_it_is_the_same_model(student, wide):
    """W + up @ down, without an alpha; crop_h = 8 K is the third number of the sizes."""
    path = student / "lora.safetensors"
    unet, model = UNet2DConditionModel.from_pretrained(wide / "unet"), load.load_sdxl(wide)
    modules = {
        name: module for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }  # fmt: skip
    layers, left_over = comfyui_loads(load_file(path), list(modules))
    assert not left_over
    for name, module in modules.items():
        if comfyui_layer(name) in layers:
            up, down = layers.pop(comfyui_layer(name))
            module.weight += (up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
    assert not layers
    lora, *_ = read_lora(path, model.unet, model.encoder_1, model.encoder_2)
    add_adapter(model.unet, "student", lora)
    x_t, cond = example(2, torch.float32)
    t, K = torch.tensor([999, 250]), torch.tensor([4, 7])
    sizes = crop(cond, 8 * K)["time_ids"]
    added = {"text_embeds": cond["pooled"], "time_ids": sizes}
    expected = unet(x_t, t, cond["prompt_embeds"], added_cond_kwargs=added).sample
    with active_adapters(model.unet, student=1.0):
        assert close(num_steps.with_k(model.unet, K)(x_t, t, cond), expected, 1e-5)
        assert not close(num_steps.with_k(model.unet, 4)(x_t, t, cond)[1:], expected[1:], 1e-3)


def test_a_controlnet_is_not_told(student, wide, here, tmp_path):
    """The UNet of every pass sees the crop (8 K, 0), the ControlNet (0, 0)."""
    shared = {k: v for k, v in WIDE.items() if k not in ("out_channels", "up_block_types")}
    randomise(ControlNetModel(**shared), 9).save_pretrained(tmp_path / "control")
    Image.new("RGB", (72, 64), "grey").save(tmp_path / "edges.png")
    crops = []

    def watch(module, inputs):
        if isinstance(module, UNet | ControlNet):
            crops.append((type(module), *inputs[2]["time_ids"][:, 2:4].flatten().tolist()))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    words = ["--controlnet", tmp_path / "control", "--control-image", tmp_path / "edges.png"]
    here(student / "lora.safetensors", 4, 1, *words)
    handle.remove()
    assert len(crops) == 8 and {*crops} == {(UNet, 32, 0), (ControlNet, 0, 0)}


# ------------------------------------------------------------------------------------ --export-k


@pytest.mark.parametrize("K", [4, 8])
def test_exported_for_one_k_it_needs_no_crop(
    K, student, wide, here, monkeypatch, capsys, tmp_path, caplog
):
    """Both files give the told student's latents, here and in diffusers; alpha is half the rank."""
    output = tmp_path / "new" / "one.safetensors"
    words = ["--model", wide, "--lora", student / "lora.safetensors", "--export-k", K]
    code, out, err = run_sample(monkeypatch, capsys, *words, "--output", output, "--device", "cpu")
    assert (code, err) == (0, "")
    kohya = output.with_name("one_kohya.safetensors")
    assert out.endswith(f"for {K} steps: {output}, {kohya}\n")
    header = header_of(output)
    assert "tdd_told_ks" not in header and (header["tdd_K"], header["tdd_method"]) == (
        f"{K}",
        "tdd",
    )
    recipe = {"cfg": 2.0, "gamma": 0.0, "steps": K, "kmin": K, "kmax": K, "tcf": "1",
              "solver_steps": 250, "tune_guidance": 4.5}  # fmt: skip
    assert read_recipe(output, header) == read_recipe(kohya, header_of(kohya)) == recipe
    for cfg in (1, 2):
        expected = here(student / "lora.safetensors", K, cfg)
        for path in (output, kohya):
            assert close(here(path, K, cfg), expected, 1e-5), (path, cfg)
            pipeline = in_diffusers(wide, path, caplog)
            assert close(their_latents(pipeline, wide, K, cfg), expected, 1e-5), (path, cfg)
    # And at another strength, which a file that is told K cannot have, it is any LoRA.
    pipeline = in_diffusers(wide, output, caplog)
    pipeline.set_adapters("default_0", 0.5)
    half = here(f"{output}:0.5", K, 2)
    assert close(their_latents(pipeline, wide, K, 2), half, 1e-5)
    assert not close(half, expected, 1e-2)


def test_export_of_a_jump_that_is_told_its_end(wide, tmp_path):
    """With TCF(S+)'s embedding there is no file in kohya's naming, which has no place for it."""
    unet = load.load_sdxl(wide).unet
    lora = busy(unet, 8, 4.0, scalar="target_time", told_ks=KS)
    path = tmp_path / "told.safetensors"
    write_diffusers(path, lora, tdd_told_ks="[4, 5, 6, 7, 8]")
    (output,) = export_for_one_K(path, 6, unet, tmp_path / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["told.safetensors", "x.safetensors"]
    again, *_ = read_lora(output, unet, *NO_ENCODERS)
    for name, p in lora.scalar_embedding.state_dict().items():
        assert torch.equal(again.scalar_embedding.state_dict()[name], p)


@torch.no_grad()
def test_export_of_a_file_that_was_rounded_to_half_precision(student, wide, tmp_path):
    """What its reader, no longer exact, makes of every K is what is carried over."""
    half = tmp_path / "half.safetensors"
    tensors = {k: v.half() for k, v in load_file(student / "lora.safetensors").items()}
    save_file(tensors, half, header_of(student / "lora.safetensors"))
    unet = load.load_sdxl(wide).unet
    (one, _) = export_for_one_K(half, 6, unet, tmp_path / "x.safetensors")
    x_t, cond = example(2, torch.float32)
    t = torch.tensor([999, 250])
    for name, path in (("half", half), ("one", one)):
        add_adapter(unet, name, read_lora(path, unet, *NO_ENCODERS)[0])
    with active_adapters(unet, half=1.0):
        expected = unet(x_t, t, crop(cond, 48))
    with active_adapters(unet, one=1.0):
        assert close(unet(x_t, t, crop(cond, 0)), expected, 1e-5)


EXPORTS = [
    (["--export-k", 4], "--export-k needs one --lora, and --output NAME.safetensors"),
    (["--export-k", 4, "--lora", "TOLD"], "--export-k needs one --lora, and --output NAME"),
    (["--export-k", 4, "--output", "x.safetensors"], "--export-k needs one --lora"),
    (["--export-k", 4, "--lora", "TOLD", "--lora", "PLAIN", "--output", "x.safetensors"],
     "--export-k needs one --lora"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "x.png"], "--output NAME.safetensors"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "EMPTY"], "--output NAME.safetensors"),
    (["--export-k", 9, "--lora", "TOLD", "--output", "x.safetensors"],
     "--export-k 9: TOLD is told [4, 5, 6, 7, 8]"),
    (["--export-k", 4, "--lora", "PLAIN", "--output", "x.safetensors"], "PLAIN is told no K"),
    (["--export-k", 0, "--lora", "TOLD"], "at least 1"),
    (["--export-k", 4, "--lora", "TOLD:0.5", "--output", "x.safetensors"], "without a scale"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "TOLD"], "TOLD would replace TOLD: name"),
    (["--export-k", 4, "--lora", "KOHYA", "--output", "TOLD"], "TOLD would replace TOLD: name"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "KOHYA"], "KOHYA would replace KOHYA: name"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "PLAIN"], "PLAIN would replace PLAIN: name"),
    (["--export-k", 4, "--lora", "TOLD", "--unet", "PLAIN", "--output", "PLAIN"],
     "PLAIN would replace PLAIN: name"),
    (["--export-k", 4, "--lora", "nowhere.safetensors", "--output", "x.safetensors"], "is missing"),
    (["--export-k", 4, "--lora", "TOLD", "--output", "FILE/x.safetensors"], "cannot write"),
    *((["--export-k", 4, "--lora", "TOLD", "--output", "x.safetensors", *more],
       f"{more[0]} is for pictures, not --export-k: leave it away")
      for more in (["--prompt", "a"], ["--prompts", "FILE"], ["--tell-k", 4], ["--steps", 8],
                   ["--controlnet", "x"], ["--seed", 1], ["--low-memory"], ["--gamma", 0])),
    (["--lora", "TOLD:0.5"], "that are told K have scales of 0.5 together, and need 1: write"),
    (["--lora", "TOLD:2"], "have scales of 2 together"),
    (["--lora", "TOLD", "--lora", "KOHYA"], "have scales of 2 together"),
    (["--tell-k", 3, "--lora", "TOLD"], "--tell-k 3: the --lora knows [4, 5, 6, 7, 8]"),
    (["--tell-k", 4, "--lora", "PLAIN"], "--tell-k 4: the --lora knows no K"),
    (["--tell-k", 4], "--tell-k 4: the --lora knows no K"),
    (["--tell-k", "four", "--lora", "TOLD"], "a whole number"),
    (["--lora", "TOLD", "--lora", "OTHER"], "(4, 5, 6, 7, 8) and (4, 8): give one of them"),
    (["--tell-k", 4, "--lora", "TOLD", "--lora", "OTHER"], "give one of them"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(student, wide, tmp_path_factory):
    """A told LoRA, the same in kohya's naming, one that is not told, and one told other K."""
    root = tmp_path_factory.mktemp("files")
    unet = load.load_sdxl(wide).unet
    paths = {"TOLD": student / "lora.safetensors", "KOHYA": student / "lora_kohya.safetensors",
             "PLAIN": root / "plain.safetensors", "OTHER": root / "other.safetensors",
             "FILE": root / "file", "EMPTY": root / "empty"}  # fmt: skip
    write_diffusers(paths["PLAIN"], busy(unet), tdd_method="pcm", tdd_K="4")
    write_diffusers(paths["OTHER"], busy(unet, told_ks=(4, 8)), tdd_told_ks="[4, 8]")
    paths["FILE"].write_text("in the way")
    paths["EMPTY"].mkdir()
    # With their usual names: the one in kohya's naming is written beside the other.
    for name in ("TOLD", "KOHYA"):
        paths[name] = shutil.copy(paths[name], root / paths[name].name)
    return paths


@pytest.mark.parametrize(("words", "message"), EXPORTS)
def test_what_cannot_be_told_is_refused_in_one_line(
    words, message, files, monkeypatch, capsys, tmp_path
):
    """Before the model is loaded: there is none under this name."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in files.values() if path.is_file()}
    for name, path in files.items():
        words = [str(word).replace(name, str(path)) for word in words]
        message = message.replace(name, str(path))
    base = ["--model", "nowhere", "--device", "cpu"]
    if "--export-k" not in words:
        base += ["--prompt", "a"]
    code, _, err = run_sample(monkeypatch, capsys, *base, *words)
    assert (code, err.count("\n")) == (2, 1) and message in err, err
    assert err.startswith("sample.py: ")
    assert not list(tmp_path.iterdir())
    assert all(path.read_bytes() == content for path, content in before.items())


# --------------------------------------------------------------------------- headers and --init

BROKEN = ["", "7", "[]", "{}", '{"4": 1}', '"48"', "[0]", "[-4]", "[4.5]", "[true]", '["4"]',
          "[4, 4]", "[[4]]", "[4, null]", "[99999999999]", "4, 8", "[4", "null", "[NaN]",
          "[" * 10**5]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_broken_headers_are_refused_in_one_line(text, files, wide, monkeypatch, capsys, tmp_path):
    header = {"tdd_method": "tdd", "tdd_told_ks": text}
    with pytest.raises(
        ValueError, match=r"its header is broken, tdd_told_ks .*: download it again"
    ):
        read_recipe(tmp_path / "x.safetensors", header)
    path = tmp_path / "x.safetensors"
    save_file(load_file(files["TOLD"]), path, header)
    for words in (["--prompt", "a"], ["--export-k", 4, "--output", tmp_path / "y.safetensors"]):
        code, _, err = run_sample(monkeypatch, capsys, "--model", wide, "--lora", path, *words)
        assert (code, err.count("\n"), "its header is broken" in err) == (2, 1, True), err


def test_headers_say_what_the_student_is_told(student, files):
    expected = {"cfg": 2.0, "gamma": 0.0, "steps": 4, "kmin": 4, "kmax": 8, "tcf": "1",
                "solver_steps": 250, "tune_guidance": 4.5, "told_ks": KS}  # fmt: skip
    for name in ("lora", "lora_kohya"):
        path = student / f"{name}.safetensors"
        assert read_recipe(path, header_of(path)) == expected
    assert "told_ks" not in read_recipe(files["PLAIN"], header_of(files["PLAIN"]))
    assert read_recipe(files["PLAIN"], {"tdd_told_ks": "[8, 1]"}) == {"told_ks": (8, 1)}


def test_a_told_lora_beside_one_that_is_not(files, wide, here, monkeypatch, capsys, tmp_path):
    """The header of one is enough; without its layer for K, a told file is refused."""
    both = here(files["PLAIN"], 4, 1, "--lora", files["TOLD"])
    apart = here(files["PLAIN"], 4, 1)
    assert not close(both, apart, 1e-2)
    tensors = {k: v for k, v in load_file(files["TOLD"]).items() if "add_embedding" not in k}
    save_file(tensors, tmp_path / "x.safetensors", {"tdd_told_ks": "[4, 8]"})
    for words in (["--prompt", "a"], ["--export-k", 4, "--output", tmp_path / "y.safetensors"]):
        flags = ["--model", wide, "--device", "cpu", "--lora", tmp_path / "x.safetensors", *words]
        code, _, err = run_sample(monkeypatch, capsys, *flags)
        assert (
            code == 2 and "has lost the layer for K, which its header has" in err.splitlines()[-1]
        )


@pytest.mark.parametrize("name", ["TOLD", "KOHYA"])
def test_a_told_lora_without_its_header_is_refused(
    name, files, wide, here, monkeypatch, capsys, tmp_path
):
    """Programs that write a LoRA anew often drop what they do not know; it would be sampled untold.

    A file of --export-k needs no header.
    """
    path = tmp_path / "x.safetensors"
    save_file(load_file(files[name]), path)
    words = ["--model", wide, "--device", "cpu", "--lora", path, "--prompt", "a"]
    code, _, err = run_sample(monkeypatch, capsys, *words)
    message = f"{path} is told K, but has lost the header that says which (tdd_told_ks): use"
    assert code == 2 and message in err.splitlines()[-1]
    unet = load.load_sdxl(wide).unet
    one, _ = export_for_one_K(files[name], 6, unet, tmp_path / "one.safetensors")
    with_header = here(one, 6, 1)
    save_file(load_file(one), path)
    assert torch.equal(here(path, 6, 1), with_header)


def test_the_nearest_k_is_told_with_a_line(files, wide, monkeypatch, capsys, tmp_path):
    """And pictures hold which K it was: made again by their command, they are the same."""
    flags = ["--model", wide, "--device", "cpu", "--height", 64, "--width", 64, "--prompt", "a"]
    flags += ["--lora", files["OTHER"], "--cfg", 1]

    def picture(name, *words):
        code, out, err = run_sample(
            monkeypatch, capsys, *flags, *words, "--output", tmp_path / name
        )
        assert code == 0, err
        lines = [line for line in err.splitlines() if "told K" in line]
        with Image.open(tmp_path / name) as image:
            return np.asarray(image), dict(image.text), lines, out

    pixels, text, lines, out = picture("x.png", "--steps", 3)
    assert lines == ["3 steps: told K = 4, the nearest of [4, 8]"]
    assert "from the header of other.safetensors: " in out and "tell-k 4" in out
    settings = json.loads(text["settings"])
    assert settings["tell_k"] == 4 and "export_k" not in settings
    words = shlex.split(text["command"])[2:]
    assert "--tell-k=4" in words
    words = [word for word in words if not word.startswith("--output")]
    assert run_sample(monkeypatch, capsys, *words, "--output", tmp_path / "y.png")[0] == 0
    with Image.open(tmp_path / "y.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert json.loads(image.text["settings"]) == settings
    for steps, K in ((6, 4), (7, 8), (1, 4), (9, 8)):
        assert picture("z.png", "--steps", steps)[2] == [
            f"{steps} steps: told K = {K}, the nearest of [4, 8]"
        ]
    assert picture("z.png", "--steps", 4)[2] == []
    other, text, lines, _ = picture("z.png", "--steps", 3, "--tell-k", 8)
    assert lines == [] and json.loads(text["settings"])["tell_k"] == 8
    assert not np.array_equal(other, pixels)
    # A set of pictures is not gone on with when another K is told.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    flags[flags.index("--prompt") : flags.index("--prompt") + 2] = ["--prompts", prompts]
    words = [*flags, "--steps", 2, "--output", tmp_path / "set"]
    assert run_sample(monkeypatch, capsys, *words)[0] == 0
    code, _, err = run_sample(monkeypatch, capsys, *words, "--tell-k", 8)
    assert code == 2 and "was made with another tell_k" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["lora.safetensors", "lora_kohya.safetensors"])
@torch.no_grad()
def test_init_goes_on_with_the_same_ks(name, student, wide):
    """The student of the file: its reader is frozen, its vectors keep scale 1 whatever alpha is."""
    init = train_sdxl.read_init(student / name, load.load_sdxl(wide), KS)
    step = build.build_step(settings(alpha=16.0), load.load_sdxl(wide).unet, "cpu", init)
    base = load.load_sdxl(wide).unet
    add_adapter(base, "file", init)
    x_t, cond = example(2, torch.float32)
    t, K = torch.tensor([999, 250]), torch.tensor([4, 7])
    with active_adapters(base, file=1.0):
        expected = base(x_t, t, crop(cond, 8 * K))
    assert close(num_steps.with_k(step.student, K)(x_t, t, cond), expected, 1e-5)
    adapter, old = step.lora.adapters[num_steps.LINEAR_1], init.adapters[num_steps.LINEAR_1]
    assert torch.equal(adapter.down, old.down) and torch.allclose(adapter.up, old.up)
    learned = {id(p) for p in step.student.parameters()}
    assert id(adapter.down) not in learned and id(adapter.up) in learned
    adapter, old = step.lora.adapters[num_steps.LINEAR_2], init.adapters[num_steps.LINEAR_2]
    assert adapter.scale == 2.0 and torch.allclose(2 * adapter.up, old.up)


def test_init_of_a_lora_that_is_not_told_begins_to_be(files, wide):
    """It is the file's student for every K, and takes K from there."""
    init = train_sdxl.read_init(files["PLAIN"], load.load_sdxl(wide), KS)
    step = build.build_step(settings(), load.load_sdxl(wide).unet, "cpu", init)
    base = load.load_sdxl(wide).unet
    add_adapter(base, "file", init)
    x_t, cond = example(2, torch.float32)
    t = torch.tensor([999, 250])
    with torch.no_grad(), active_adapters(base, file=1.0):
        for K in KS:
            expected = base(x_t, t, crop(cond, 0))
            assert close(num_steps.with_k(step.student, K)(x_t, t, cond), expected, 1e-5), K


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ks", 4, 8], "is told K of [4, 5, 6, 7, 8]: give --ks 4 5 6 7 8"),
        (["--ks", *KS, "--no-tell-k"], "give --ks 4 5 6 7 8"),
        ([], "is told K of [4, 5, 6, 7, 8]: give --ks 4 5 6 7 8"),
        (["--method", "tdm", "--ks", 4], "give --ks 4 5 6 7 8"),
    ],
)
def test_init_of_other_ks_is_refused(words, message, student, wide, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n")
    path = student / "lora.safetensors"
    flags = ["--model", wide, "--data", tmp_path / "prompts.txt", "--init", path, "--steps", 1]
    flags += ["--output", tmp_path / "out", "--device", "cpu", "--resolution", 64]
    flags += ["--batch-size", 1, "--grad-accum", 1, "--solver-steps", 10, "--sample-every", 0]
    if "tdm" not in words:
        flags += ["--pairs", "teacher"]
    code, _, err = run(train_sdxl, monkeypatch, capsys, *flags, *words)
    lines = [line for line in err.splitlines() if line.startswith("train_sdxl.py: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
