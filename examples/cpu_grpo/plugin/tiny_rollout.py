"""Rollout: one Ray actor that holds a plain transformers model and samples from it."""

from __future__ import annotations

import os
import zlib
from collections import Counter

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


def _server_name(replica_rank: int) -> str:
    return f"tiny_rollout_server_{replica_rank}"


class TinyServer:
    """Generates token by token; requests are answered one after the other.

    Each request is seeded by the weights' step, its prompt and how often that prompt was asked
    for at that step, so that a run does not depend on the order in which requests arrive.
    """

    def __init__(self, model_path: str, response_length: int, seed: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        config = AutoConfig.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
        self._eos = config.eos_token_id
        self._response_length = response_length
        self._seed = seed
        self._step = 0
        self._asked: Counter[int] = Counter()

    async def load_weights(self, state_dict: dict[str, torch.Tensor], step: int | None) -> None:
        """Replace all weights; a missing or unknown name is an error."""
        if self._model.config.tie_word_embeddings:
            state_dict.setdefault("lm_head.weight", state_dict["model.embed_tokens.weight"])
        self._model.load_state_dict(state_dict, strict=True)
        self._step = step or 0
        self._asked.clear()

    async def generate(self, request_id, prompt_ids, sampling_params, **_) -> TokenOutput:
        """Sample one reply, greedily at temperature 0."""
        limit = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or self._response_length
        temperature = float(sampling_params.get("temperature", 1.0))
        tokens, log_probs = self._sample(list(prompt_ids), int(limit), temperature)
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs,
            stop_reason="completed" if tokens[-1] == self._eos else "length",
            extra_fields={"global_steps": self._step},
        )

    @torch.inference_mode()
    def _sample(self, prompt: list[int], limit: int, temperature: float) -> tuple[list[int], list[float]]:
        generator = self._generator(prompt)
        tokens: list[int] = []
        log_probs: list[float] = []
        inputs, cache = torch.tensor([prompt]), None
        while len(tokens) < limit and (not tokens or tokens[-1] != self._eos):
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            log_p = torch.log_softmax(output.logits[0, -1] / (temperature or 1.0), dim=-1)
            choice = torch.multinomial(log_p.exp(), 1, generator=generator) if temperature else log_p.argmax()
            tokens.append(int(choice))
            log_probs.append(float(log_p[tokens[-1]]))
            inputs = torch.tensor([tokens[-1:]])
        return tokens, log_probs

    def _generator(self, prompt: list[int]) -> torch.Generator:
        key = zlib.crc32(repr(prompt).encode())
        self._asked[key] += 1
        seed = zlib.crc32(repr((self._seed, self._step, key, self._asked[key])).encode())
        return torch.Generator().manual_seed(seed)

    async def _nothing(self, *_, **__) -> None:
        """Memory, cache and profiling calls have no meaning here."""

    wake_up = sleep = abort_all_requests = resume_generation = _nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing


class TinyReplica(RolloutReplica):
    """Starts the server actor of one group of workers."""

    async def launch_servers(self) -> None:
        name = _server_name(self.replica_rank)
        options = {"name": name, "num_cpus": 0, "max_concurrency": self.max_concurrency}
        server = ray.remote(TinyServer).options(**options)
        self._server_handle = server.remote(self.model_config.path, self.config.response_length, self.replica_rank)
        self._server_address = name
        self.servers = [self._server_handle]


class TinyRollout(BaseRollout):
    """The worker's end: the first worker of a replica sends the full weights to the server."""

    def __init__(self, config, model_config, device_mesh, **kwargs):
        super().__init__(config, model_config, device_mesh)
        rank, size = int(os.environ["RANK"]), self._workers_per_replica()
        self._replica_rank, self._leads = rank // size, rank % size == 0

    def _workers_per_replica(self) -> int:
        c = self.config
        return c.tensor_model_parallel_size * c.data_parallel_size * c.pipeline_model_parallel_size

    async def resume(self, tags) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=None, **kwargs) -> None:
        """Every rank walks `weights`, for gathering a full tensor is a collective."""
        full = {name: tensor.detach().clone() for name, tensor in weights if self._leads}
        if self._leads:
            server = ray.get_actor(_server_name(self._replica_rank))
            await server.load_weights.remote(full, global_steps)
