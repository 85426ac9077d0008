#!/bin/sh
# Starts the training of this run directory, as the launcher does.
# worker.json holds the job and the plan; from a checkpoint in checkpoints/ it continues.
set -eu
cd -- /home/me
export ACCELERATE_USE_CPU=false
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
export HF_HUB_DISABLE_PROGRESS_BARS=1
export HF_HUB_DISABLE_TELEMETRY=1
export PET_RDZV_ENDPOINT=127.0.0.1:0
export PYTHONPATH=/home/me/launcher
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True
export TOKENIZERS_PARALLELISM=false
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
export TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
exec /usr/bin/python3 -m accelerate.commands.launch --config_file '/home/me/my runs/1/accelerate.yaml' --main_process_port 0 --tee 3 --log_dir '/home/me/my runs/1/logs' --rdzv_backend loopback -m launcher.worker '/home/me/my runs/1'
