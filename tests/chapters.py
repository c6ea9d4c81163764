"""Runs chapters, each in a process of its own.

Where the system can fork, the processes begin with what chapters import, which saves seconds for each. They import this
module, too, so it imports little.
"""

import importlib
import multiprocessing
import os
from pathlib import Path

FORKED = "forkserver" in multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if FORKED else "spawn")
if FORKED:
    PROCESSES.set_forkserver_preload([
        "torch", "torch.distributed.tensor", "torch._dynamo", "accelerate", "librosa", "zarr", "safetensors.torch",
        "matplotlib.pyplot", "ipywidgets", "nbdev.test"])


def run_chapter(chapter: Path, root: Path, told: Path) -> None:
    """In its process: `nbdev_test` on one notebook of a checkout; what is printed goes to a file."""
    file = os.open(told, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"COLUMNS": "200", "NO_COLOR": "1"}
    os.chdir(root)
    importlib.import_module("nbdev.test").nbdev_test(path=str(chapter.relative_to(root)), n_workers=0)


def ran(chapter: Path, root: Path, told: Path) -> str:
    """What the chapter printed; the test fails with it if a cell does."""
    process = PROCESSES.Process(target=run_chapter, args=(chapter, root, told))
    process.start()
    process.join()
    text = told.read_text()
    assert process.exitcode == 0, f"{chapter.name} exited {process.exitcode}\n{text[-8000:]}"
    return text
