"""One thread per process, as `make test` runs a process per core and many of them start more; and shapes are checked
while testing: the annotations of the losses become assertions."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

install_import_hook("redistill.losses", "beartype.beartype")
