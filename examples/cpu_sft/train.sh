#!/usr/bin/env bash
# Real SFT by unmodified verl on CPU: two FSDP ranks over gloo, a tiny model.
# usage: train.sh torchrun|ray OUTDIR [hydra overrides...]     (a later override of a key wins over the ones here)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 2 ] || { echo "usage: $0 torchrun|ray OUTDIR [hydra overrides...]" >&2; exit 2; }
launch=$1
mkdir -p "$2"
out=$(cd "$2" && pwd); shift 2
python=${PYTHON:-python}
grpo=$here/../cpu_grpo

. "$grpo/environment.sh"

[ -f "$out/assets/sft_test.parquet" ] || "$python" "$grpo/make_assets.py" "$out/assets"

case $launch in
  torchrun) run=("$python" -m torch.distributed.run --standalone --nnodes=1 --nproc_per_node=2 -m verl.trainer.sft_trainer) ;;
  ray) run=("$python" -m verl.trainer.sft_trainer_ray)
       export RAY_OVERRIDE_RESOURCES='{"CPU":24,"GPU":2}' RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 ;;
  *) echo "$launch: expected torchrun or ray" >&2; exit 2 ;;
esac

exec "${run[@]}" \
  hydra.run.dir="$out/hydra" \
  trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=2 \
  trainer.save_freq=2 trainer.test_freq=2 trainer.total_training_steps=4 trainer.total_epochs=10 \
  'trainer.logger=[console,file]' \
  trainer.project_name=cpu_sft trainer.experiment_name=tiny trainer.default_local_dir="$out/checkpoints" \
  data.train_files="$out/assets/sft_train.parquet" data.val_files="$out/assets/sft_test.parquet" \
  data.train_batch_size=8 data.micro_batch_size_per_gpu=4 data.max_length=128 data.num_workers=0 \
  data.ignore_input_ids_mismatch=True \
  model.path="$out/assets/model" ++model.override_config.attn_implementation=sdpa \
  model.use_remove_padding=False model.enable_gradient_checkpointing=False \
  engine.strategy=fsdp2 engine.use_torch_compile=False optim.lr=1e-2 \
  "$@"
