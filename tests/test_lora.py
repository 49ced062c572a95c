"""LoRA against peft and diffusers: the arithmetic, and every naming in both directions."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdxl import keys, load
from sdxl.lora import TARGET_MODULES, LoRA, active_adapters, add_adapter, merge
from sdxl.lora_files import read_lora, write_diffusers, write_kohya
from tests.oracles import ALL, Reference, close, ours


def peft_unet(folder, rank=4, alpha=2, seed=0, unet=None, name="default", targets=ALL):
    """Diffusers' UNet with a random adapter of peft's on every published target."""
    unet = unet or UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    for key, p in unet.named_parameters():
        if f".{name}." in key:
            p.data = torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    return unet.requires_grad_(False)


def inputs(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    cond = {
        "prompt_embeds": torch.randn((2, 77, 128), generator=generator).to(dtype),
        "pooled": torch.randn((2, 48), generator=generator).to(dtype),
        "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64], [128, 64, 8, 0, 64, 64]]),
    }
    x = torch.randn((2, 4, 8, 8), generator=generator)
    return x.to(dtype), torch.tensor([999, 250]), cond


def theirs(unet):
    x, t, cond = inputs(dtype=unet.dtype)
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    return unet(x, t, cond["prompt_embeds"], added_cond_kwargs=added).sample


@pytest.fixture
def model(folder):
    return load.load_sdxl(folder)


def read(path, model):
    return read_lora(path, model.unet, model.encoder_1, model.encoder_2)


def spelled(naming, unet, path, alpha):
    """A peft UNet's adapter in a file of the given naming, as its own tools write it."""
    state = get_peft_model_state_dict(unet)
    if naming == "peft":
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=ALL).to_dict()
        StableDiffusionXLPipeline.save_lora_weights(
            path.parent, state, weight_name=path.name, unet_lora_adapter_metadata=config
        )
    elif naming == "older diffusers":  # never knew alpha: it is folded in
        state = {k: v * (alpha / 4 if "lora_B" in k else 1) for k, v in state.items()}
        older = {}
        for k, v in convert_state_dict_to_diffusers(state).items():
            k = k.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
            older[f"unet.{k}"] = v.contiguous()
        save_file(older, path)
    else:
        kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
        kohya |= {k: torch.tensor(float(alpha)) for k in kohya if k.endswith(".alpha")}
        if naming == "kohya, original":
            kohya = in_original_names(kohya, unet)
        save_file({k: v.contiguous() for k, v in kohya.items()}, path)


def in_original_names(kohya, unet):
    from unet import UNetConfig

    table = keys.unet_modules(UNetConfig.from_json(dict(unet.config)))
    modules = {
        n.replace(".base_layer", "") for n, m in unet.named_modules() if hasattr(m, "weight")
    }

    def spell(name):
        return f"lora_unet_{name.replace('.', '_')}"

    original = {spell(m): spell(keys.to_original_key(m, table)) for m in modules}
    return {original[k.split(".", 1)[0]] + "." + k.split(".", 1)[1]: v for k, v in kohya.items()}


@pytest.mark.parametrize("naming", ["peft", "older diffusers", "kohya", "kohya, original"])
def test_every_naming_reads_as_peft_computes(naming, folder, model, tmp_path):
    unet = peft_unet(folder)
    spelled(naming, unet, tmp_path / "lora.safetensors", alpha=2)
    lora, *others = read(tmp_path / "lora.safetensors", model)
    assert [len(other.adapters) for other in others] == [0, 0]
    assert lora.adapters.keys() == {
        n
        for n, m in model.unet.named_modules()
        if TARGET_MODULES.search(n) and hasattr(m, "weight")
    }
    plain = model.unet(*inputs())
    add_adapter(model.unet, "one", lora)
    with active_adapters(model.unet, one=1.0):
        got = model.unet(*inputs())
    assert close(got, theirs(unet), 1e-5)
    assert not close(plain, theirs(unet), 1e-2)
    assert torch.equal(model.unet(*inputs()), plain)  # switched off, bit for bit
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    assert set(before) == set(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    merge(model.unet, [(lora, 1.0)])
    assert close(model.unet(*inputs()), theirs(unet), 1e-5)
    assert any(not torch.equal(before[k], v) for k, v in model.unet.state_dict().items())


def test_original_names_are_diffusers_own(folder, tmp_path):
    """Diffusers' own reader maps our original names to the module names we started from."""
    unet = peft_unet(folder)
    for naming in ("kohya", "kohya, original"):
        spelled(naming, unet, tmp_path / f"{naming}.safetensors", alpha=2)
    one, other = (
        StableDiffusionXLPipeline.lora_state_dict(
            tmp_path / f"{naming}.safetensors", unet_config=unet.config
        )
        for naming in ("kohya", "kohya, original")
    )
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(other[0][k], v) for k, v in one[0].items())
    assert one[1] == other[1]


def test_stacked_loras_with_weights(folder, model):
    unet = peft_unet(folder, name="one")
    unet = peft_unet(folder, 3, 6, 1, unet, "two", ["to_q", "to_v", "conv1"])
    unet.set_adapters(["one", "two"], [0.5, -1.2])
    generator = torch.Generator().manual_seed(0)
    for name, rank, alpha in (("one", 4, 2), ("two", 3, 6)):
        state = get_peft_model_state_dict(unet, adapter_name=name)
        lora = LoRA.init(model.unet, rank, alpha, generator)
        adapters = {}
        for layer, adapter in lora.adapters.items():
            if f"{layer}.lora_A.weight" in state:
                adapter.down.data = state[f"{layer}.lora_A.weight"]
                adapter.up.data = state[f"{layer}.lora_B.weight"]
                adapters[layer] = adapter
        add_adapter(model.unet, name, LoRA(adapters).double())
    # -1.2 times an alpha of twice the rank magnifies float32's rounding to 1e-5 of the output.
    exact, unet = inputs(dtype=torch.float64), unet.double()
    model.unet.double()
    with active_adapters(model.unet, one=0.5, two=-1.2):
        assert close(model.unet(*exact), theirs(unet), 1e-12)
        with active_adapters(model.unet, two=0.3):  # blocks nest, and the outer one comes back
            unet.set_adapters(["two"], [0.3])
            assert close(model.unet(*exact), theirs(unet), 1e-12)
        unet.set_adapters(["one", "two"], [0.5, -1.2])
        assert close(model.unet(*exact), theirs(unet), 1e-12)


def test_gradients_are_pefts(folder, model):
    unet, x = peft_unet(folder), inputs()[0]
    params = {k: p.requires_grad_() for k, p in unet.named_parameters() if ".default." in k}
    (theirs(unet) * x).sum().backward()
    lora = LoRA.init(model.unet, 4, 2, torch.Generator())
    state = get_peft_model_state_dict(unet)
    for name, adapter in lora.adapters.items():
        adapter.down.data = state[f"{name}.lora_A.weight"]
        adapter.up.data = state[f"{name}.lora_B.weight"]
    add_adapter(model.unet, "one", lora)
    with active_adapters(model.unet, one=1.0):
        (model.unet(*inputs()) * x).sum().backward()
    for name, adapter in lora.adapters.items():
        for ours_, part in ((adapter.down, "lora_A"), (adapter.up, "lora_B")):
            assert close(ours_.grad, params[f"{name}.{part}.default.weight"].grad, 1e-3), name
    assert all(p.grad is None for p in model.unet.parameters())


def test_fresh_lora_is_pefts_start(folder, model):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.add_adapter(LoraConfig(r=64, lora_alpha=8, target_modules=ALL))
    state = get_peft_model_state_dict(unet)
    lora = LoRA.init(model.unet, 64, 8, torch.Generator().manual_seed(0))
    assert {f"{n}.lora_{p}.weight" for n in lora.adapters for p in "AB"} == set(state)
    for name, adapter in lora.adapters.items():
        a = state[f"{name}.lora_A.weight"]
        assert adapter.scale == 0.125
        assert adapter.up.shape == state[f"{name}.lora_B.weight"].shape
        assert not adapter.up.any()
        assert adapter.down.shape == a.shape
        assert adapter.down.abs().max().item() == pytest.approx(a.abs().max().item(), rel=0.02)
        assert adapter.down.std().item() == pytest.approx(a.std().item(), rel=0.05)


@pytest.mark.parametrize("write", [write_diffusers, write_kohya])
def test_what_we_write_loads_in_diffusers_and_here(write, folder, model, tmp_path, caplog):
    path = tmp_path / "lora.safetensors"
    unet = peft_unet(folder, alpha=1)
    spelled("peft", unet, path, alpha=1)
    lora = read(path, model)[0]
    write(path, lora, steps="20000", base="sdxl")
    fresh = UNet2DConditionModel.from_pretrained(folder / "unet")
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        path, unet_config=fresh.config, return_lora_metadata=True
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, fresh, metadata=metadata)
    assert "unexpected" not in caplog.text.lower()
    assert "missing" not in caplog.text.lower()
    loaded = get_peft_model_state_dict(fresh, adapter_name=next(iter(fresh.peft_config)))
    assert len(loaded) == 2 * len(lora.adapters)
    assert close(theirs(fresh), theirs(unet), 1e-5)
    again = read(path, model)[0]
    add_adapter(model.unet, "again", again)
    with active_adapters(model.unet, again=1.0):
        assert close(model.unet(*inputs()), theirs(unet), 1e-5)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert file.metadata()["steps"] == "20000"


def te_file(path, naming, reference, seed=0):
    """A LoRA on both text encoders' query projections, scale 0.5; the deltas it stands for."""
    generator, tensors, deltas = torch.Generator().manual_seed(seed), {}, []
    for i in (1, 2):
        for layer in range(3):
            down = torch.randn((2, 64), generator=generator)
            up = torch.randn((64, 2), generator=generator)
            name = f"text_model.encoder.layers.{layer}.self_attn.q_proj"
            if naming == "kohya":
                key = f"lora_te{i}_{name.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                            f"{key}.alpha": torch.tensor(1.0)}  # fmt: skip
            else:
                key = ("text_encoder." if i == 1 else "text_encoder_2.") + name
                tensors |= {f"{key}.lora_linear_layer.down.weight": down,
                            f"{key}.lora_linear_layer.up.weight": 0.5 * up}  # fmt: skip
            deltas.append((i - 1, layer, 0.5 * up @ down))
    save_file(tensors, path)
    for i, layer, delta in deltas:
        encoder = getattr(reference.encoders[i], "text_model", reference.encoders[i])
        encoder.encoder.layers[layer].self_attn.q_proj.weight.data += delta


@pytest.mark.parametrize("naming", ["kohya", "older diffusers"])
def test_loras_of_both_kinds_through_sample(naming, folder, monkeypatch, capsys, tmp_path):
    """--lora twice: text encoders at 1, the UNet at 0.7; against diffusers with those weights."""
    reference = Reference(folder)
    te_file(tmp_path / "te.safetensors", naming, reference)
    unet = peft_unet(folder)
    spelled("peft", unet, tmp_path / "unet.safetensors", alpha=2)
    unet.set_adapters(["default"], [0.7])
    reference.unet = unet
    words = ["--lora", tmp_path / "te.safetensors", "--lora", f"{tmp_path}/unet.safetensors:0.7"]
    got = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", "a fox", *words)
    expected = reference.latents("a fox", 0, 64, 72, [999, 751, 499, 251])
    assert close(got, expected)


def test_two_unet_loras_through_sample(folder, monkeypatch, capsys, tmp_path):
    """A style LoRA on top of TDD's: both merged, against peft with both adapters active."""
    words, reference = [], Reference(folder)
    for seed, (name, scale) in enumerate({"tdd": 0.7, "style": -0.4}.items()):
        path = tmp_path / f"{name}.safetensors"
        spelled("kohya" if seed else "peft", peft_unet(folder, seed=seed), path, alpha=2)
        peft_unet(folder, seed=seed, unet=reference.unet, name=name)
        words += ["--lora", f"{path}:{scale}"]
    reference.unet.set_adapters(["tdd", "style"], [0.7, -0.4])
    got = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", "a fox", *words)
    assert close(got, reference.latents("a fox", 0, 64, 72, [999, 751, 499, 251]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: {**t, "unet.nowhere.lora_A.weight": torch.ones(1, 1)},
            "fit nothing: unet.nowhere.lora_A",
        ),
        (
            lambda t: {**t, "lora_unet_conv1.hada_w1_a": torch.ones(1, 1)},
            "lora_unet_conv1.hada_w1_a",
        ),
        (lambda t: dict(list(t.items())[1:]), "up or a down matrix only"),
        (
            lambda t: {k: v.repeat(1, 2) if "to_q.lora_A" in k else v for k, v in t.items()},
            "another model",
        ),
        (lambda t: {"x": torch.ones(1)}, "no LoRA for this model"),
    ],
)
def test_wrong_files_are_refused(spoil, message, folder, model, tmp_path):
    path = tmp_path / "lora.safetensors"
    spelled("peft", peft_unet(folder), path, alpha=2)
    save_file(spoil(load_file(path)), path)
    with pytest.raises(ValueError, match=message) as refusal:
        read(path, model)
    assert str(path) in str(refusal.value)


PATTERNS = [
    ({}, 8, False),
    ({"mid_block.resnets.0.conv1": 2}, 8, False),
    ({"to_q": 16, ".*attn1.to_k": 1}, 8, False),  # regular expressions for the end of a name
    ({}, 8, True),
]


@pytest.mark.parametrize(("pattern", "alpha", "stable"), PATTERNS)
def test_headers_mean_what_peft_means(pattern, alpha, stable, folder, model, tmp_path):
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=ALL, alpha_pattern=pattern,
                        use_rslora=stable)  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for key, p in unet.named_parameters():
        if ".default." in key:
            p.data = 0.3 * torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(unet), weight_name="lora.safetensors",
        unet_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    merge(model.unet, [(read(tmp_path / "lora.safetensors", model)[0], 1.0)])
    with torch.no_grad():
        assert close(model.unet(*inputs()), theirs(unet), 1e-4)  # a wrong alpha: 0.3 and more


def test_keys_of_other_tools(folder, model, tmp_path):
    """Raw PEFT, the oldest diffusers, and text encoders as transformers 5 names them."""
    state = get_peft_model_state_dict(peft_unet(folder))
    raw = {f"base_model.model.{k}": v for k, v in state.items()}
    old, tower = {}, {}
    for k, v in state.items():
        if ".attn" in k and (".to_q." in k or ".to_out.0." in k):
            k = k.replace(".to_out.0.", ".to_out.").replace(".to_", ".processor.to_")
            k = k.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")
            old[f"unet.{k}"] = v
    for i, part in ((1, "lora_A"), (2, "lora_B")):
        name = f"encoder.layers.0.self_attn.q_proj.{part}.weight"
        tower[f"text_encoder.{name}"] = torch.ones((2, 64) if i == 1 else (64, 2))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    cases = [(raw, 0, len(raw) // 2), (old, 0, len(old) // 2), (tower, 1, 1)]
    for tensors, component, count in cases:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "lora.safetensors")
        got = read(tmp_path / "lora.safetensors", model)[component]
        assert len(got.adapters) == count > 0
    save_file({k: v.contiguous() for k, v in raw.items()}, tmp_path / "lora.safetensors")
    lora = read(tmp_path / "lora.safetensors", model)[0]
    assert {adapter.scale for adapter in lora.adapters.values()} == {0.5}
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        read(tmp_path / "lora.safetensors", model)
    save_file({k: v.contiguous() for k, v in old.items()}, tmp_path / "lora.safetensors")
    for name, adapter in read(tmp_path / "lora.safetensors", model)[0].adapters.items():
        assert torch.equal(adapter.down, state[f"{name}.lora_A.weight"])
        assert torch.equal(adapter.up, state[f"{name}.lora_B.weight"])


def test_broken_header_is_refused(folder, model, tmp_path):
    path = tmp_path / "lora.safetensors"
    spelled("older diffusers", peft_unet(folder), path, alpha=4)
    for broken in ("null", "{", "[]"):
        save_file(load_file(path), path, {"lora_adapter_metadata": broken})
        with pytest.raises(ValueError, match="header's lora_adapter_metadata is broken"):
            read(path, model)
