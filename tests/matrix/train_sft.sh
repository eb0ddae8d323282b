#!/usr/bin/env bash
# Real SFT on CPU by a verl from 0.5 to 0.8 under torchrun: the trainer of its time, two FSDP ranks over gloo.
# usage: train_sft.sh OUTDIR [hydra overrides...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd); shift
python=${PYTHON:-python}
grpo=$here/../../examples/cpu_grpo
release=$("$python" -c 'from importlib import metadata; print(metadata.version("verl"))')
[ -f "$out/assets/sft_test.parquet" ] || PYTHONPATH=$grpo "$python" "$here/old_assets.py" "$out/assets"

export PYTHONPATH=$here/cpu:$grpo/plugin${PYTHONPATH:+:$PYTHONPATH} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=${HF_HOME:-$out/hf_home}
export HYDRA_FULL_ERROR=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$out/metrics.jsonl} TENSORBOARD_DIR=$out/tensorboard

case $release in
  0.5.*|0.6.*|0.7.0)
    program=fsdp_sft_trainer logger='[console,tensorboard]'
    of_release=(data.multiturn.enable=True model.partial_pretrain="$out/assets/model"
                model.enable_gradient_checkpointing=False model.strategy=fsdp2) ;;
  *)
    program=sft_trainer logger='[console,file]'
    export VERL_USE_EXTERNAL_MODULES=plain_rollouts
    of_release=(data.num_workers=0 data.ignore_input_ids_mismatch=True model.path="$out/assets/model"
                ++model.override_config.attn_implementation=sdpa model.use_remove_padding=False
                model.enable_gradient_checkpointing=False engine.strategy=fsdp2 engine.use_torch_compile=False) ;;
esac

exec "$python" -m torch.distributed.run --standalone --nnodes=1 --nproc_per_node=2 -m verl.trainer.$program \
  hydra.run.dir="$out/hydra" trainer.nnodes=1 trainer.n_gpus_per_node=2 \
  trainer.save_freq=1 trainer.test_freq=2 trainer.total_training_steps=3 trainer.total_epochs=10 \
  trainer.logger="$logger" trainer.device=cpu \
  trainer.project_name=matrix trainer.experiment_name=sft trainer.default_local_dir="$out/checkpoints" \
  data.train_files="$out/assets/sft_train.parquet" data.val_files="$out/assets/sft_test.parquet" \
  data.train_batch_size=8 data.micro_batch_size_per_gpu=4 data.max_length=128 optim.lr=1e-2 \
  "${of_release[@]}" "$@"
