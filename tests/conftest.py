"""Shapes are checked while testing: the annotations of the losses become assertions."""

import os

import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(2)

install_import_hook("redistill.losses", "beartype.beartype")
