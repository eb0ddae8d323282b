"""Tiny models of many families, by name: `config(name)` is what `sharding.build` takes.

`WRITTEN` are spelled out. `SHRUNK` are made of the class's own default configuration, its
sizes cut down by the names of their keys: families nobody thought of cost one line.
"""

from __future__ import annotations

from typing import Any

from tests.support.sharding import QWEN2, QWEN3_MOE

LLAMA = QWEN2 | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
VISION = {
    "depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 40, "num_heads": 4,
    "num_attention_heads": 4, "out_hidden_size": 32, "patch_size": 4, "image_size": 16,
}  # fmt: skip
TEXT = {k: v for k, v in QWEN3_MOE.items() if k not in ("architectures", "model_type")}
SEEING = {"text_config": TEXT, "vision_config": VISION}
WRITTEN = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen3": QWEN2 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12},
    "gemma2": LLAMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 12},
    "gemma3_text": LLAMA
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True},
    "phi3": LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
    "mixtral": LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "olmoe": LLAMA
    | {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA
    | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "head_dim": 12},
    "qwen2_moe": QWEN3_MOE
    | {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 40},
    "glm4_moe": QWEN3_MOE
    | {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 6, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "deepseek_v3": LLAMA
    | {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "moe_intermediate_size": 24,
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    },
    "t5": {  # `wo` stays float32 in float16
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8, "d_ff": 64,
        "num_layers": 2, "num_heads": 4, "vocab_size": 131,
    },
    "ernie4_5_moe": QWEN3_MOE  # its router's correction stays float32
    | {"model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 4},
    "qwen3_next": QWEN3_MOE
    | {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "shared_expert_intermediate_size": 40},
    "gemma3": SEEING | {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    "qwen2_5_vl": SEEING | {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
    "qwen3_vl": SEEING | {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]},
    "qwen3_vl_moe": SEEING | {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]},
}  # fmt: skip

HYBRID = {"num_hidden_layers": 4}  # a layer of every kind
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
VQ = {
    "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32,
    "num_embeddings": 64, "resolution": 16,
}  # fmt: skip
TEXT_ONLY = (
    "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "olmoe", "gpt_oss", "qwen2_moe",
    "glm4_moe", "deepseek_v3", "ernie4_5_moe",
)  # fmt: skip
"""Of those, the ones that need nothing but token ids."""
SHRUNK: dict[str, dict[str, Any]] = {
    # decoders, one dense block after the other
    "ApertusForCausalLM": {},  # parameters that the class makes in the dtype of its config
    "ArceeForCausalLM": {},
    "BioGptForCausalLM": {},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {},
    "CTRLLMHeadModel": {},
    "Cohere2ForCausalLM": {},
    "CohereForCausalLM": {},
    "DiffLlamaForCausalLM": {},
    "Ernie4_5ForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "FalconForCausalLM": {},
    "GPT2LMHeadModel": {},  # Conv1D: stored as (in, out)
    "GPTBigCodeForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {},
    "Gemma3nForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "laurel_rank": 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "intermediate_size": [40, 40],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": 131},
    "GemmaForCausalLM": {},
    "Glm4ForCausalLM": {},
    "GlmForCausalLM": {},
    "GraniteForCausalLM": {},
    "HeliumForCausalLM": {},
    "HrmTextForCausalLM": {},  # one tensor on disk is made of several
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "LlamaForTokenClassification": {"num_labels": 1},
    "MT5ForConditionalGeneration": {},
    "MptForCausalLM": {},
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "OPTForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {},
    "PersimmonForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen3ForTokenClassification": {"num_labels": 1},
    "SeedOssForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "XGLMForCausalLM": {},
    "XLNetLMHeadModel": {},  # makes its parameters in float32, whatever is asked for
    # mixtures of experts
    "AfmoeForCausalLM": {},
    "Cohere2MoeForCausalLM": {},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DeepseekV4ForCausalLM": {},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ExaoneMoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "Glm4MoeLiteForCausalLM": {},
    "GlmMoeDsaForCausalLM": {},
    "GptOssForTokenClassification": {"num_labels": 1},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeSharedForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "JetMoeForCausalLM": {},
    "Llama4ForCausalLM": {},
    "LongcatFlashForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "Mistral4ForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen3MoeForTokenClassification": {"num_labels": 1},
    # state spaces, convolutions, linear attention, and what mixes them
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "FalconH1ForCausalLM": {},
    "FalconMambaForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"num_hidden_layers": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "MambaForCausalLM": {},
    "MiniMaxForCausalLM": HYBRID,
    "NemotronHForCausalLM": {},
    "OlmoHybridForCausalLM": HYBRID,  # A_log is float32 by its class
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5MoeForCausalLM": HYBRID,
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "RwkvForCausalLM": {},
    "Zamba2ForCausalLM": {
        "num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        "num_mem_blocks": 2, "mamba_expand": 2, "n_mamba_heads": 8, "mamba_headdim": 8, "adapter_rank": 4,
        "use_shared_attention_adapter": True,
    },
    "ZambaForCausalLM": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "xLSTMForCausalLM": {},
    # encoders with decoders: embeddings tied three times over, buffers in place of positions
    "BartForConditionalGeneration": {},
    "BlenderbotForConditionalGeneration": {},
    "MarianMTModel": {},
    "PegasusForCausalLM": {},
    "T5GemmaForTokenClassification": {"num_labels": 1},
    "WhisperForCausalLM": {},
    # seeing and hearing
    "AriaForConditionalGeneration": {},
    "AyaVisionForConditionalGeneration": {},
    "Blip2ForConditionalGeneration": {},  # its first parameter stays float32 in float16
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 90}, "vq_config": VQ},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 16],
            **MROPE,
        },
        "vision_config": {"hidden_size": 32},
    },
    "EvollaForProteinText2Text": {},  # saves float32 buffers
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "embed_dim": [8, 8, 16, 16], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2], "depths": [1, 1, 1, 1],
        }
    },
    "Glm4vForConditionalGeneration": {"text_config": MROPE},
    "Glm4vMoeForConditionalGeneration": {"text_config": MROPE},
    "Idefics3ForConditionalGeneration": {},
    "InstructBlipForConditionalGeneration": {},
    "InternVLForConditionalGeneration": {},
    "LlavaForConditionalGeneration": {},
    "LlavaNextForConditionalGeneration": {},
    "LlavaOnevisionForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "MllamaForConditionalGeneration": {},
    "PaliGemmaForConditionalGeneration": {},
    "Phi4MultimodalForCausalLM": {},
    "Qwen2AudioForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {"text_config": MROPE},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"text_config": MROPE},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {},
    "Qwen3_5ForConditionalGeneration": {"text_config": HYBRID},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": HYBRID},
    "SmolVLMForConditionalGeneration": {},
    "T5Gemma2ForConditionalGeneration": {},
    "VoxtralForConditionalGeneration": {},
}  # fmt: skip
"""Architecture → what its shrunk configuration has besides."""

_SIZES = {
    "n_group topk_group shared_experts first_k_dense_replace mamba_expand": 1,
    "num_key_value_heads num_kv_heads": 2,
    "layers n_layer depth": 2,
    "num_experts_per_tok top_k_experts moe_topk moe_k moe_top_k": 2,
    "_heads n_head": 4,
    "num_local_experts num_experts routed_experts": 4,
    "num_query_tokens num_image_tokens mm_tokens_per_image patch_size": 4,
    "qk_head_dim": 16,
    "head_dim d_kv d_state state_size d_head headdim": 8,
    "lora_rank image_size sliding_window window_size chunk_size": 16,
    "hidden_size d_model n_embd embed_dim hidden_dim embedding_size emb_dim output_dim projection_dim width d_ssm": 32,
    "encoder_dim vision_output_dim projector_input_dim projector_output_dim embedding_dim embed_proj_dim": 32,
    "intermediate_size intermediate_dim ffn_dim d_ff n_inner ffn_hidden_size": 40,
    "position_embeddings n_positions max_seq_len n_ctx source_positions target_positions": 64,
    "vocab_size": 131,
}
"""Ends of keys → what is left of a larger number there; the first that fits counts."""
_DERIVED = frozenset({
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attn_layer_indices", "rope_parameters",
    "rope_scaling", "moe_layers", "indexer_types", "transformers_version", "architectures", "dtype", "_name_or_path",
    "id2label", "label2id",
})  # fmt: skip
"""Keys that a configuration makes of its sizes, or that say nothing of the model's."""


def config(name: str) -> dict[str, Any]:
    """The configuration of the family `name`, for `sharding.build`."""
    if name in WRITTEN:
        return WRITTEN[name]
    import transformers

    kind = getattr(transformers, name).config_class
    values = {"model_type": kind.model_type, "architectures": [name]}
    return _merged(values | _shrunk(kind), SHRUNK[name])


def names() -> list[str]:
    """Every family that the installed transformers has, and whose `config.json` it can read."""
    import transformers

    kinds = {name: getattr(transformers, name).config_class for name in SHRUNK if hasattr(transformers, name)}
    return [*WRITTEN, *(name for name, kind in kinds.items() if kind.model_type in transformers.CONFIG_MAPPING)]


def _shrunk(kind: type) -> dict[str, Any]:
    default = kind()
    values: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        nested = getattr(default, key, None)
        if hasattr(nested, "sub_configs"):
            values[key] = _shrunk(type(nested)) | ({"model_type": nested.model_type} if nested.model_type else {})
        elif key in _DERIVED or isinstance(value, bool):
            continue
        elif key.endswith(("token_id", "token_index")):
            if isinstance(value, int) and value >= 100:
                values[key] = 100 + sum(map(ord, key)) % 27  # in the vocabulary, and rarely one for two
            elif isinstance(value, list):
                values[key] = [min(v, 50) for v in value]
        elif isinstance(value, int):
            size = next((size for ends, size in _SIZES.items() if key.endswith(tuple(ends.split()))), value)
            values[key] = min(value, size)
    return values


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    nested = {
        k: _merged(values[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(values.get(k), dict)
    }
    return values | more | nested
