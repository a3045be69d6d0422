"""The allocator is told to keep freed memory, unless the user has told it something else."""

import os
import platform
import subprocess
import sys

import pytest

WATCH = """
import resource, sys
from redistill.cli.memory import keep_freed_memory
taken = keep_freed_memory()
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ones = torch.ones(2**20)
def block():
    [ones + i for i in range(10)]

for _ in range(3):
    block()
before = faults()
for _ in range(50):
    block()
print(taken, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is set")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_tensors_are_made_of_kept_pages_unless_the_user_sets_the_allocator(own):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCH], env=environment | own, capture_output=True, text=True, check=True
    )
    taken, faults = done.stdout.split()
    assert taken == str(not own)
    # 500 tensors of 1,024 pages each.
    assert own or int(faults) < 20_000
