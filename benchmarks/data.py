"""Can the data feed 8 GPUs? Images a second from a folder of JPEGs, from tars and from a cache."""

import math
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import BenchConfig, alternate
from common.files import atomic_write, output_folder
from training import cache
from training.images import Images
from training.streams import Entry, Loader, Stream

PHOTOS, TARS, WIDTH, HEIGHT = 64, 4, 1600, 1200
RESOLUTION, BATCH_SIZE, GPUS = 1024, 16, 8
# Images a second that an H200 trains at batch 16, measured in docs/performance.md.
GPU_RATE = 7


# ----------------------------------------------------------------------------------------- the data
#
# Files are whole or absent, so a second run finds them, and a run after a break writes the rest.


def photo(seed: int) -> Image.Image:
    """Noise at scales from a quarter of the width to a pixel, as a JPEG 0.4 MB."""
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    cells, amplitude = 4, 60.0
    while cells < WIDTH:
        for channel in range(3):
            noise = rng.normal(0, amplitude, (cells * HEIGHT // WIDTH, cells)).astype(np.float32)
            pixels[..., channel] += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT)))
        cells, amplitude = 2 * cells, 0.7 * amplitude
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(batch: dict) -> dict:
    """Stands in for the autoencoder and the text encoders: SDXL's shapes and precisions."""
    b = len(batch["names"])
    cond = {"prompt_embeds": torch.randn(b, 77, 2048).half(), "pooled": torch.randn(b, 1280).half()}
    return {"latents": torch.randn(b, 4, 128, 128), **cond, "time_ids": batch["time_ids"]}


def write_data(folder: Path) -> None:
    """The folders photos/, tars/ with the same images and captions, and cache/."""
    photos, tars = output_folder(folder / "photos"), output_folder(folder / "tars")
    stems = [f"{i:04}" for i in range(PHOTOS)]
    for i, stem in enumerate(tqdm(stems, desc="writing photos", dynamic_ncols=True)):
        if not (photos / f"{stem}.jpg").exists():
            (photos / f"{stem}.txt").write_text(f"a picture of noise, number {i}")
            with atomic_write(photos / f"{stem}.jpg") as part:
                photo(i).save(part, "JPEG", quality=90)
    for i in range(TARS):
        if not (tars / f"{i:04}.tar").exists():
            with atomic_write(tars / f"{i:04}.tar") as part, tarfile.open(part, "w") as tar:
                for stem in stems[i::TARS]:
                    tar.add(photos / f"{stem}.jpg", f"{stem}.jpg")
                    tar.add(photos / f"{stem}.txt", f"{stem}.txt")
    # `encode` looks at no pixels, so the smallest images that can be read will do.
    loader = Loader(Images(photos, 8, BATCH_SIZE, seed=0, once=True), workers=1)
    cache.fill(folder / "cache", loader, encode, {"photos": PHOTOS}, 0, 1, barrier=lambda: None)


# ---------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Rate:
    """Images that so many workers deliver in wall seconds, and the CPU seconds of all threads."""

    workers: int
    images: int
    seconds: float
    cpu_seconds: float

    @property
    def per_worker(self) -> float:
        """Images a second."""
        return self.images / self.seconds / self.workers

    @property
    def needed(self) -> int:
        """Workers that one GPU's process needs."""
        return math.ceil(GPU_RATE / self.per_worker)


def run_loader(dataset: Stream, batches: int, workers: int) -> int:
    """The number of images in so many batches, taken as training takes them but without a step."""
    return sum(len(batch["names"]) for batch in islice(Loader(dataset, workers), batches))


def run_beside_python(dataset: Stream, batches: int, workers: int) -> int:
    """run_loader beside a thread that never lets go of the interpreter's lock by itself.

    No training loop is as bad: its operators let go of the lock.
    """
    stop = Event()

    def spin():
        while not stop.is_set():
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(spin)
        try:
            return run_loader(dataset, batches, workers)
        finally:
            stop.set()


def run_threads(function, entries: list[Entry], workers: int) -> int:
    """A function of each entry in threads that make no batches."""
    with ThreadPoolExecutor(workers) as pool:
        return sum(1 for _ in pool.map(function, entries))


def decode_jpeg(entry: Entry) -> None:
    """Pillow's decoding alone, of a loose image."""
    Image.open(entry.source.image[0]).load()


def make_calls(folder: Path) -> dict:
    """Each source of what write_data wrote, and parts of the work: a function of the workers."""
    # A single pass leaves no batches on their way that would slow the next measurement.
    photos = Images(folder / "photos", RESOLUTION, BATCH_SIZE, seed=0, once=True)
    tars = Images(folder / "tars", RESOLUTION, BATCH_SIZE, seed=0, once=True)
    cached = cache.Cached(folder / "cache", BATCH_SIZE, seed=0)
    *entries, _ = photos.walk(0, 0)
    batches = math.ceil(PHOTOS / BATCH_SIZE)
    return {
        "folder": partial(run_loader, photos, batches), "tars": partial(run_loader, tars, batches),
        # A cached batch takes a millisecond.
        "cache": partial(run_loader, cached, 100 * batches),
        "folder beside Python": partial(run_beside_python, photos, batches),
        "examples, no batches": partial(run_threads, photos.example, entries),
        "JPEG decoding alone": partial(run_threads, decode_jpeg, entries),
    }  # fmt: skip


def measure_data(calls: dict, rounds: int) -> dict[tuple[str, int], Rate]:
    """Rates of these calls with one worker and with two, by name and number of workers."""
    runs = {(name, n): partial(call, workers=n) for n in (1, 2) for name, call in calls.items()}
    seconds, rates = alternate(runs, rounds, "cpu"), {}
    for (name, workers), run in runs.items():
        start = time.process_time()
        images = run()
        cpu_seconds = time.process_time() - start
        rates[name, workers] = Rate(workers, images, seconds[name, workers], cpu_seconds)
    return rates


def bench_data(config: BenchConfig) -> None:
    """A line for each source and number of workers, at 1024 pixels; no model takes part."""
    # As torchrun sets it for several processes on a machine.
    torch.set_num_threads(1)
    write_data(config.dir / "data")
    rates = measure_data(make_calls(config.dir / "data"), config.rounds)
    print(f"{RESOLUTION} pixels, batch {BATCH_SIZE}, {os.cpu_count()} CPU cores")
    print(f"last columns: workers that a GPU and {GPUS} need for {GPU_RATE} images/s each")
    titles = ("workers", "images/s", "a worker", "CPU ms", "one GPU", f"{GPUS} GPUs")
    print(f"{'':20}", *(f"{title:>10}" for title in titles))
    for (name, workers), rate in rates.items():
        images_s, cpu_ms = rate.images / rate.seconds, 1000 * rate.cpu_seconds / rate.images
        figures = f"{workers:10} {images_s:10.1f} {rate.per_worker:10.1f} {cpu_ms:10.2f}"
        print(f"{name:20} {figures} {rate.needed:10} {GPUS * rate.needed:10}")
