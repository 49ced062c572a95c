"""One thread a worker: two workers of one thread are faster than one worker of two."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: half a minute or more; the README leaves it out")
