"""`python -m phi_fast.train`: the command line of the trainer in `phi_fast.training.loop`.

python -m phi_fast.train                                        one process, no launcher
torchrun --nproc_per_node 8 -m phi_fast.train --recipe phi-1.5   one node
deepspeed --module phi_fast.train --recipe phi-1.5               DeepSpeed's launcher
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin, end_on_signals

    begin("phi_fast.train", "PyTorch and DeepSpeed")
    end_on_signals("phi_fast.train")

import os
import sys
from collections.abc import Sequence

from .errors import INTERRUPTED, PhiFastError
from .startup import tolerate_encodings
from .terminal import console
from .training.config_file import as_toml
from .training.distributed import join, leave, lost_rank
from .training.loop import train
from .training.resuming import parse_command
from .training.signals import Signals, StoppedEarly

__all__ = ["INTERRUPTED", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status.

    0: done. INTERRUPTED: stopped and saved. 2: an error, whose message was printed. 130: Ctrl-C before the first step,
    or a second Ctrl-C.
    """
    tolerate_encodings()
    rank = os.environ.get("RANK", "0")
    is_main = rank == "0"
    try:
        with Signals() as signals:
            options = parse_command(sys.argv[1:] if arguments is None else arguments)
            options.check()
            if options.print_config:
                print(as_toml(options) if is_main else "", end="")
                return 0
            signals.world = join(options.device, options.rank_timeout)
            return train(options, signals, console(quiet=not is_main, soft_wrap=True))
    except (PhiFastError, OSError, RuntimeError) as raised:
        error = lost_rank(raised) or raised
        if not isinstance(error, PhiFastError | OSError):
            raise
        if is_main or not isinstance(error, PhiFastError) or error.one_rank:
            tell(f"error{'' if is_main else f' on rank {rank}'}: {error}")
        return error.status if isinstance(error, PhiFastError) else 2
    except StoppedEarly as stopped:
        if is_main:
            tell(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        if is_main:
            tell("ended at once: what was not saved is lost; --resume goes on from the newest checkpoint")
        return 130


def tell(text: str) -> None:
    """Print on stderr why a run ends early."""
    console(stderr=True, soft_wrap=True).print(text, style="red")


if __name__ == "__main__":
    status = main()
    leave()
    sys.exit(status)
