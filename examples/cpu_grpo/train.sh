#!/usr/bin/env bash
# Real GRPO by unmodified verl on CPU: two FSDP workers over gloo, a tiny model.
# usage: train.sh OUTDIR [hydra overrides...]     (a later override of a key wins over the ones here)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [hydra overrides...]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd); shift
python=${PYTHON:-python}

# The plug-in that teaches verl the CPU; VERL_ENGINE_DEVICE is the key under which verl registers its FSDP engines.
export PYTHONPATH=$here/plugin${PYTHONPATH:+:$PYTHONPATH}
export VERL_USE_EXTERNAL_MODULES=cpu_verl VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# Nothing is fetched, nothing is left in the user's cache.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=${HF_HOME:-$out/hf_home}
export RAY_USAGE_STATS_ENABLED=0 HYDRA_FULL_ERROR=1
# verl names, in every process, each training engine that is not installed.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::UserWarning:verl.workers.engine}
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$out/metrics.jsonl}  # verl truncates it, on resume too
# Ten small processes on few cores: one thread each, and none before it is wanted.
export OMP_NUM_THREADS=1 TQ_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RAY_prestart_worker_first_driver=0

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
