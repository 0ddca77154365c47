"""A worker process of Beam's multi-processing runner that ends with its driver.

    python -m refrag.pipelines.engines.beam_worker FOLDER DRIVER THREADS

A file of FOLDER names the process from its start, and goes as its last act: so the driver sees a worker that died, for
which the runner itself would wait for ever. DRIVER is the driver's process id, THREADS what PyTorch may use.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from refrag_core.processes import end_with_parent

PREFIX = "worker-"


def main(folder: str, driver: str, threads: str) -> None:
    """Serve the runner that the environment names, until it says that all is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    end_with_parent(int(driver))  # Beam's worker would go on with its bundle, and then wait for a driver that is gone
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ["OPENBLAS_NUM_THREADS"] = threads  # NumPy's, in each of as many workers, whatever is exported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    sys.argv = ["sdk_worker"]
    runpy.run_module("apache_beam.runners.worker.sdk_worker_main", run_name="__main__")
    Path(folder, f"{PREFIX}{os.getpid()}").unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
