#!/usr/bin/env bash
# Real PPO without a critic on CPU by a verl from 0.5 to 0.8, with its legacy trainer and a rollout by plain transformers.
# usage: train_ppo.sh OUTDIR [hydra overrides...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd); shift
python=${PYTHON:-python}
grpo=$here/../../examples/cpu_grpo
release=$("$python" -c 'from importlib import metadata; print(metadata.version("verl"))')
[ -f "$out/assets/test.parquet" ] || PYTHONPATH=$grpo "$python" "$here/old_assets.py" "$out/assets"

export PYTHONPATH=$here/cpu:$grpo/plugin${PYTHONPATH:+:$PYTHONPATH} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=${HF_HOME:-$out/hf_home}
export RAY_USAGE_STATS_ENABLED=0 HYDRA_FULL_ERROR=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RAY_OVERRIDE_RESOURCES='{"CPU":12,"GPU":2}' RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_prestart_worker_first_driver=0 RAY_object_store_memory=200000000

rollout=actor_rollout_ref.rollout reward=custom_reward_function
case $release in
  0.5.*) of_release=($rollout.name=hf) ;;
  0.6.*) of_release=($rollout.name=hf $rollout.mode=sync $rollout.agent.num_workers=1)
         export VERL_USE_EXTERNAL_MODULES=plain_rollouts ;;
  *) of_release=($rollout.name=tiny $rollout.agent.num_workers=1 data.dataloader_num_workers=0
                 reward.num_workers=1 +actor_rollout_ref.model.override_config.attn_implementation=sdpa)
     export VERL_USE_EXTERNAL_MODULES=plain_rollouts
     reward=reward.custom_reward_function ;;
esac

exec "$python" -m verl.trainer.main_ppo \
  hydra.run.dir="$out/hydra" algorithm.adv_estimator=reinforce_plus_plus \
  trainer.nnodes=1 trainer.n_gpus_per_node=2 'trainer.logger=[console]' \
  trainer.save_freq=1 trainer.test_freq=1 trainer.total_training_steps=3 trainer.total_epochs=10 \
  trainer.project_name=matrix trainer.experiment_name=ppo trainer.default_local_dir="$out/checkpoints" \
  data.train_files="$out/assets/train.parquet" data.val_files="$out/assets/test.parquet" \
  data.train_batch_size=4 data.max_prompt_length=64 data.max_response_length=8 \
  actor_rollout_ref.model.path="$out/assets/model" actor_rollout_ref.model.use_remove_padding=False \
  actor_rollout_ref.model.enable_gradient_checkpointing=False \
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2 \
  actor_rollout_ref.actor.optim.lr=1e-2 actor_rollout_ref.actor.use_torch_compile=False \
  '+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}' \
  $rollout.n=1 $rollout.tensor_model_parallel_size=1 $rollout.dtype=float32 \
  $rollout.log_prob_micro_batch_size_per_gpu=2 \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2 \
  $reward.path="$grpo/reward.py" $reward.name=compute_score \
  "${of_release[@]}" "$@"
