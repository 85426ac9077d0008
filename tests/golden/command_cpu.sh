#!/bin/sh
# Starts the training of this run directory, as the launcher does.
# worker.json holds the job and the plan; from a checkpoint in checkpoints/ it continues.
set -eu
cd -- /home/me
export ACCELERATE_USE_CPU=true
export CUDA_VISIBLE_DEVICES=''
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
export HF_HUB_DISABLE_PROGRESS_BARS=1
export HF_HUB_DISABLE_TELEMETRY=1
export MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=1099511627776
export OMP_NUM_THREADS=2
export PYTHONPATH=/home/me/launcher
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
exec /usr/bin/python3 -m accelerate.commands.launch --config_file '/home/me/my runs/1/accelerate.yaml' -m launcher.worker '/home/me/my runs/1'
