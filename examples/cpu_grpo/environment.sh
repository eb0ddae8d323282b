# Sourced by the scripts that train on a CPU; `out` is the directory of the run.
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The plug-in that teaches verl the CPU; VERL_ENGINE_DEVICE is the key under which verl registers its FSDP engines.
export PYTHONPATH=$examples/plugin${PYTHONPATH:+:$PYTHONPATH}
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
