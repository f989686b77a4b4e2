"""One of several gloo processes; writes what it found. Started by the fixture ``in_processes``.

``python one_of_several.py FILE FUNCTION RANK SIZE STORE OUT`` calls ``FUNCTION(rank, size)`` of a file and saves the
arrays of the dictionary that it returns.
"""

import os
import runpy
import sys
import traceback
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

if __name__ == "__main__":
    file, function, rank, size, store, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
    torch.set_num_threads(1)
    code = 1
    try:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        found = runpy.run_path(file)[function](rank, size)
        np.savez(out, **{name: np.asarray(value) for name, value in found.items()})
        dist.barrier()  # none leaves while another still talks to it
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of gloo and autograd still run; an interpreter that ends may destroy one of them, and abort.
        os._exit(code)
