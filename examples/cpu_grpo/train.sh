#!/usr/bin/env bash
# Real GRPO by unmodified verl on CPU: two FSDP workers over gloo, a tiny model.
# usage: train.sh OUTDIR [hydra overrides...]     (a later override of a key wins over the ones here)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [hydra overrides...]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd); shift
python=${PYTHON:-python}

. "$here/environment.sh"

[ -f "$out/assets/test.parquet" ] || "$python" "$here/make_assets.py" "$out/assets"

exec "$python" -m verl.trainer.main_ppo \
  hydra.run.dir="$out/hydra" \
  algorithm.adv_estimator=grpo \
  trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=2 \
  trainer.use_v1=True trainer.v1.trainer_mode=sync \
  trainer.v1.sampler.custom_sampler.path=pkg://cpu_verl.sampler \
  trainer.v1.sampler.custom_sampler.name=impatient_replay_buffer \
  trainer.save_freq=2 trainer.test_freq=2 trainer.total_training_steps=4 trainer.total_epochs=100 \
  trainer.val_before_train=True 'trainer.logger=[console,file]' \
  trainer.project_name=cpu_grpo trainer.experiment_name=tiny trainer.default_local_dir="$out/checkpoints" \
  data.train_files="$out/assets/train.parquet" data.val_files="$out/assets/test.parquet" \
  data.train_batch_size=8 data.max_prompt_length=64 data.max_response_length=16 data.dataloader_num_workers=0 \
  actor_rollout_ref.model.path="$out/assets/model" \
  ++actor_rollout_ref.model.override_config.attn_implementation=sdpa \
  actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.model.enable_gradient_checkpointing=False \
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
  actor_rollout_ref.actor.optim.lr=2e-2 \
  actor_rollout_ref.actor.use_torch_compile=False actor_rollout_ref.actor.fsdp_config.use_torch_compile=False \
  '++actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}' \
  actor_rollout_ref.rollout.name=tiny actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.dtype=float32 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.agent.num_workers=1 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
  actor_rollout_ref.rollout.val_kwargs.do_sample=True actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
  reward.num_workers=1 \
  reward.custom_reward_function.path="$here/reward.py" reward.custom_reward_function.name=compute_score \
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
  ray_kwargs.ray_init.num_cpus=11 ++ray_kwargs.ray_init.num_gpus=2 ++ray_kwargs.ray_init.address=local \
  ++ray_kwargs.ray_init.include_dashboard=False ++ray_kwargs.ray_init.object_store_memory=200000000 \
  "$@"
