"""torchrun, by this file's path: `python -P _torchrun.py <torchrun's arguments>`.

What it imports is never garbage. Without looking for some in it, at the start and once more at the end, it takes about
two thirds of the processor time: a second less for every launch.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()
    from torch.distributed.run import main

    gc.freeze()
    gc.enable()
    main()
