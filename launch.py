"""Runs a recipe from pictures to a report, or continues a run that was interrupted.

    python launch.py --config=configs/digits.py --workdir=runs/digits
    python launch.py --config=configs/mae_ct_vitl.py:aug --workdir=… --config.data.train=imagenet2012
    python launch.py --config=… --workdir=… --config.stages=head,tune,evaluate --config.init_from=runs/earlier

Exit status: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 asked to stop (the same command continues).
"""

import os
import sys


def main() -> int:
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # its threads spin against XLA's: eigvalsh of 256 x 256 took 820 ms, not 3
    try:
        from maect_jax import run  # after that line, which NumPy reads when it loads

        return run.main(sys.argv[1:])
    except KeyboardInterrupt:  # while modules load; later `training.stop` takes care
        print("stopped: SIGINT before anything was trained", file=sys.stderr)
        return 6


if __name__ == "__main__":
    sys.exit(main())
