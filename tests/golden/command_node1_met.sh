#!/bin/sh
# Starts the training of this run directory, as the launcher does.
# worker.json holds the job and the plan; from a checkpoint in checkpoints/ it continues.
set -eu
cd -- /home/me
export PYTHONPATH=/home/me/launcher
export PYTHONSAFEPATH=1
exec /usr/bin/python3 -m launcher.run.node '/home/me/my runs/1' --rank 1 --address head.cluster --port 29500
