"""`distributed_run` under FSDP2, which accelerate selects on accelerators only."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from tests.distributed.distributed_run import main


def take_cpus_for_gpus() -> None:
    """
    Let accelerate see a launch on GPUs, on which alone it selects FSDP.

    Nothing else is changed: the tensors stay on the CPU, and gloo moves them.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), before_training=take_cpus_for_gpus)
    PartialState().destroy_process_group()
    # Without waiting for the threads of the groups that gather checkpoints, which may abort the interpreter's exit.
    sys.stdout.flush()
    os._exit(0)
