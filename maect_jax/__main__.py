"""Everything beside training: python -m maect_jax {evaluate, embed, compare, convert, inspect, data, doctor} …

Exit status: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 asked to stop.
"""

import os
import sys


def main() -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see launch.py
    try:
        from maect_jax.commands import command_line  # after that line, which NumPy reads when it loads

        return command_line.main(sys.argv[1:])
    except KeyboardInterrupt:  # while modules load; later `training.stop` takes care
        print("stopped: SIGINT before anything was done", file=sys.stderr)
        return 6


if __name__ == "__main__":
    sys.exit(main())
