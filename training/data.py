"""The data of a run, from its settings: prompts, images with captions, or a cache of latents."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl.load import SDXL
from sdxl.pipeline import encode_batch
from training import cache, distributed
from training.images import Images
from training.listing import CONTENTS
from training.streams import Loader, Prompts


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from: a file of prompts, or images, directly or through a cache.

    settings: what the cache's content depends on beside the data. min_size: of an image's short
    side, in pixels.
    """

    data: Path
    is_prompts: bool
    cache: Path | None
    settings: dict
    resolution: int
    min_size: int
    batch_size: int
    seed: int
    workers: int
    max_bad: int


def open_data(config: DataConfig, model: SDXL, rank: int, world: int, device, position) -> Loader:
    """Prompts, images with captions, or --cache's latents, from where the run stands."""
    if config.is_prompts:
        dataset = Prompts(config.data, config.batch_size, config.seed, rank, world)
    elif config.cache is None:
        dataset = _images(config, rank, world, once=False)
    else:
        dataset = open_cache(config, model, rank, world, device)
    if config.cache is None:
        model.to(device)
    _print_lines(rank, *dataset.lines)
    # Each process takes its share of what must be the same list.
    contents = {k: str(v) for k, v in dataset.identity.items() if k != "rank"}
    distributed.check_same({f"data ({name})": value for name, value in contents.items()})
    return Loader(dataset, config.workers, config.max_bad, position, model.tokenizer.tail)


def open_cache(config: DataConfig, model: SDXL, rank: int, world: int, device) -> cache.Cached:
    """--cache, filled if it is not; without --data it has to be full."""
    try:
        images = _images(config, rank, world, once=True)
    except ValueError as problem:
        # What the cache holds is all that training needs.
        if not cache.is_full(config.cache, config.settings, may_change=CONTENTS):
            raise
        _print_lines(rank, f"{problem}: the run goes on from --cache alone")
    else:
        settings = config.settings | images.contents
        if not cache.is_full(config.cache, settings):
            _print_lines(rank, *images.lines)
            fill_cache(config, images, settings, model.to(device), device)
    return cache.Cached(config.cache, config.batch_size, config.seed, rank, world)


def fill_cache(config: DataConfig, images: Images, settings: dict, model: SDXL, device) -> None:
    """Every image and caption through the autoencoder and the text encoders, once."""

    def encode(batch: dict) -> dict:
        # Seeded by the names, so that a cache that was interrupted has the same noise in it.
        names = "\n".join(batch["names"]).encode("utf-8", "surrogateescape")
        generator = torch.Generator().manual_seed(config.seed + zlib.crc32(names))
        x_0, cond = encode_batch(model, batch, generator, device)
        return {name: tensor.cpu() for name, tensor in {"latents": x_0, **cond}.items()}

    loader = Loader(images, config.workers, config.max_bad, tail=model.tokenizer.tail)
    rank, world = images.rank, images.world
    cache.fill(config.cache, loader, encode, settings, rank, world, distributed.barrier)


def _images(config: DataConfig, rank: int, world: int, once: bool) -> Images:
    return Images(
        config.data, config.resolution, config.batch_size, config.seed, rank, world, once,
        config.min_size,
    )  # fmt: skip


def _print_lines(rank: int, *lines: str) -> None:
    if rank == 0:
        print(*lines, sep="\n", flush=True)
