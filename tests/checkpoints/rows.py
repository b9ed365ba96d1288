"""The 25 checkpoints that people ran most in November 2026, by downloads, each with its twin or without one.

README's table and the tests are made from this list. Fields are those of the published config.json that can change what
a loader does; sizes are the tiny model's.
"""

from __future__ import annotations

from typing import Any

from tests.families.quantized_checkpoints import FORMATS
from tests.families.tiny_configs import WINDOW

from .twin import Composite, Row, Twin

NO_TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001, "initializer_range": 0.02}
DEEPSEEK_CODE = {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
}
MTP = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight", "shared_head.head.weight")
FURTHER = ("fc.weight", "norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
FP8 = FORMATS["fp8-blocks"]


def yarn(**fields: Any) -> dict[str, Any]:
    """As configs before transformers 5 have it; four times the tiny models' 64 first positions."""
    return {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn", **fields}}


def is_expert(name: str) -> bool:
    return ".experts." in name


QWEN35 = {
    **{"attn_output_gate": True, "full_attention_interval": 3, "mamba_ssm_dtype": "float32"},
    **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "torch_dtype": "bfloat16"},
    **{"output_router_logits": False, "router_aux_loss_coef": 0.001, "partial_rotary_factor": 0.25},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
        **{"mrope_interleaved": True, "mrope_section": [1, 1, 0]},
    },
}
QWEN35_OUTSIDE = {
    **{"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 248056},
    **{"video_token_id": 248057, "vision_start_token_id": 248053, "tie_word_embeddings": False},
    "vision_config": {"model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 16, "deepstack_visual_indexes": []},
}
QWEN3 = {
    **NO_TRAINING,
    **{"architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16", "max_window_layers": 28},
    **{"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_scaling": None},
    **{"rope_theta": 10000000, "sliding_window": None, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
}
V3 = {
    **{**DEEPSEEK_CODE, "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"},
    **{"topk_method": "noaux_tc", "scoring_func": "sigmoid", "seq_aux": True, "aux_loss_alpha": 0.001},
    **{"ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "rope_theta": 10000},
    **yarn(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
}
V4_CODES = "its FP4 experts, and fp8 scales under names of their own, are not read"
MIMO_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

ROWS = (
    Row(
        "Qwen/Qwen3.6-35B-A3B",
        "qwen3_5_moe",
        Twin(
            "qwen3_5_moe",
            "bf16, vision tower, MTP",
            QWEN35,
            further=FURTHER,
            composite=Composite("model.language_model.", QWEN35_OUTSIDE),
        ),
    ),
    Row(
        "google/gemma-4-26B-A4B-it",
        "gemma4",
        Twin(
            "gemma4",
            "bf16, vision tower",
            {
                **{"torch_dtype": "bfloat16", "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision"},
                **{"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False},
                "rope_parameters": {
                    "full_attention": {
                        **{"rope_type": "proportional", "rope_theta": 1000000.0},
                        "partial_rotary_factor": 0.25,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            composite=Composite(
                "model.language_model.",
                {
                    **{"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]},
                    **{"boi_token_id": 255999, "image_token_id": 258880, "audio_config": None},
                    **{"eos_token_id": [3, 5], "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
                    "vision_soft_tokens_per_image": 280,
                },
                tower="model.vision_tower.",
            ),
            end_tokens=(3, 5, 50),
        ),
    ),
    Row(
        "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8",
        "qwen3_moe",
        Twin(
            "qwen3_moe",
            "fp8 in blocks",
            QWEN3,
            form=FP8,
            quantization={"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.norm"]},
        ),
    ),
    Row(
        "openai/gpt-oss-120b",
        "gpt_oss",
        Twin(
            "gpt_oss",
            "MXFP4",
            {
                **{"architectures": ["GptOssForCausalLM"], "swiglu_limit": 7.0, "attention_bias": True},
                **{
                    "experts_per_token": 2,
                    "initial_context_length": 64,
                    "rope_theta": 150000,
                    "attention_dropout": 0.0,
                },
                **{"output_router_logits": False, "router_aux_loss_coef": 0.9, "torch_dtype": "bfloat16"},
                "rope_scaling": {
                    **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0, "rope_type": "yarn", "truncate": False},
                    "original_max_position_embeddings": 64,
                },
            },
            is_mxfp4=True,
            quantization={
                "modules_to_not_convert": [
                    *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
                    *("model.embed_tokens", "lm_head"),
                ]
            },
        ),
    ),
    Row("Qwen/Qwen3.8-Flash-Next", "qwen4_exp", None),
    Row("deepseek-ai/DeepSeek-V4-Flash", "deepseek_v4", None, lacks=V4_CODES),
    Row(
        "Qwen/Qwen3.5-122B-A10B-FP8",
        "qwen3_5_moe",
        Twin(
            "qwen3_5_moe",
            "fp8 in blocks, vision tower, MTP",
            QWEN35,
            form=FP8,
            quantization={"modules_to_not_convert": ["lm_head", "model.language_model.layers.0.mlp.gate"]},
            splits=True,
            further=FURTHER,
            composite=Composite("model.language_model.", QWEN35_OUTSIDE),
        ),
    ),
    Row(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "nemotron_h",
        Twin(
            "nemotron_h",
            "bf16",
            {
                **{"architectures": ["NemotronHForCausalLM"], "torch_dtype": "bfloat16", "chunk_size": 128},
                **{"hybrid_override_pattern": "ME*EM", "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"},
                **{"rescale_prenorm_residual": True, "residual_in_fp32": False, "num_logits_to_keep": 1},
                **{"time_step_floor": 0.0001, "use_bias": False, "use_conv_bias": True, "partial_rotary_factor": 1.0},
            },
            dropped=("layers_block_type", "layer_types"),
        ),
    ),
    Row("deepseek-ai/DeepSeek-V4-Pro", "deepseek_v4", None, lacks=V4_CODES),
    Row(
        "Qwen/Qwen3-Coder-Next-FP8",
        "qwen3_next",
        Twin(
            "qwen3_next",
            "fp8 in blocks, MTP",
            {
                **{"architectures": ["Qwen3NextForCausalLM"], "torch_dtype": "bfloat16", "full_attention_interval": 3},
                **{"rope_theta": 5000000, "partial_rotary_factor": 0.25, "rope_scaling": None, "mlp_only_layers": []},
                **{**NO_TRAINING, "decoder_sparse_step": 1, "use_sliding_window": False, "attention_bias": False},
            },
            dropped=("layer_types",),
            form=FP8,
            quantization={"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "mtp.fc"]},
            further=FURTHER,
        ),
    ),
    Row(
        "zai-org/GLM-5.2",
        "glm_moe_dsa",
        Twin(
            "glm_moe_dsa",
            "bf16, MTP",
            {
                **{"architectures": ["GlmMoeDsaForCausalLM"], "torch_dtype": "bfloat16", "scoring_func": "sigmoid"},
                **{"topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "ep_size": 1, "moe_layer_freq": 1},
                **{"indexer_rope_interleave": True, "attention_bias": False, "pretraining_tp": 1},
                "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            },
            behind=MTP,
        ),
    ),
    Row("zai-org/GLM-5.3-Flash", "glm5_next", None),
    Row(
        "zai-org/GLM-4.7-Flash",
        "glm4_moe_lite",
        Twin(
            "glm4_moe_lite",
            "bf16, MTP",
            {
                **{"architectures": ["Glm4MoeLiteForCausalLM"], "torch_dtype": "bfloat16", "topk_method": "noaux_tc"},
                **{"num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rope_scaling": None},
                **{"rope_theta": 1000000, "attention_bias": False},
            },
            behind=(*MTP, "embed_tokens.weight"),
        ),
    ),
    Row(
        "zai-org/GLM-4.5-Air-FP8",
        "glm4_moe",
        Twin(
            "glm4_moe",
            "fp8 a row (compressed-tensors), MTP",
            {
                **{"architectures": ["Glm4MoeForCausalLM"], "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1},
                **{"partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": True},
            },
            form=FORMATS["ct-fp8"],
            quantization={"kv_cache_scheme": None, "ignore": ["lm_head", "model.layers.1.mlp.gate"]},
            behind=MTP,
        ),
    ),
    Row(
        "MiniMaxAI/MiniMax-M2.5",
        "minimax_m2",
        Twin(
            "minimax_m2",
            "fp8 in blocks",
            {
                "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
                **{"architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1, 1, 1], "num_mtp_modules": 3},
                **{"mtp_transformer_layers": 1, "use_mtp": True, "use_qk_norm": True, "qk_norm_type": "per_layer"},
                **{"rotary_dim": 8, "scoring_func": "sigmoid", "rope_theta": 5000000, "use_routing_bias": True},
                **{"shared_intermediate_size": 0, "router_jitter_noise": 0.0},
            },
            form=FP8,
            quantization={
                "fmt": "float8_e4m3fn",
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
        ),
    ),
    Row(
        "moonshotai/Kimi-K2.5",
        "kimi_k25",
        Twin(
            "deepseek_v3",
            "int4 in groups of 32 (compressed-tensors), vision tower",
            {**V3, "rope_theta": 50000.0, "num_nextn_predict_layers": 0},
            form=FORMATS["ct-int4"],
            coded=is_expert,
            quantization={
                **{"kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": None},
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
            },
            composite=Composite(
                "language_model.",
                {
                    **{"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]},
                    **{"media_placeholder_token_id": 163605, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
                },
                tower="vision_tower.",
                text_type="kimi_k2",
                codes_inside=True,
            ),
        ),
    ),
    Row("moonshotai/Kimi-K3", "kimi_k3", None),
    Row(
        "XiaomiMiMo/MiMo-V2-Flash",
        "mimo_v2_flash",
        Twin(
            "mimo_v2_flash",
            "fp8 in blocks, MTP",
            {
                "auto_map": {"AutoConfig": "configuration_mimo_v2_flash.MiMoV2FlashConfig"},
                **{"architectures": ["MiMoV2FlashForCausalLM"], "torch_dtype": "bfloat16", "scoring_func": "sigmoid"},
                **{"topk_method": "noaux_tc", "routed_scaling_factor": None, "sliding_window_size": WINDOW - 1},
                **{"attention_value_scale": 0.707, "layer_types": MIMO_LAYERS},
            },
            form=FP8,
            quantization={"ignored_layers": ["model.layers.0.self_attn.o_proj"]},
            coded=lambda name: name != "model.layers.0.self_attn.o_proj.weight",
            further=("norm.weight",),
        ),
    ),
    Row("deepseek-ai/DeepSeek-V4.1-Flash", "deepseek_v41", None),
    Row(
        "deepseek-ai/DeepSeek-R1",
        "deepseek_v3",
        Twin("deepseek_v3", "fp8 in blocks, MTP", V3, form=FP8, behind=(*MTP, "embed_tokens.weight")),
    ),
    Row(
        "mistralai/Mistral-Small-4-119B",
        "mistral3",
        Twin(
            "mistral4",
            "bf16, vision tower",
            {"torch_dtype": "bfloat16", "attention_bias": False},
            composite=Composite(
                "language_model.",
                {
                    **{"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},
                    **{"image_token_index": 10, "spatial_merge_size": 2, "tie_word_embeddings": False},
                    "torch_dtype": "bfloat16",
                },
                tower="vision_tower.",
            ),
        ),
    ),
    Row(
        "poolside/Laguna-S-2.1",
        "laguna",
        Twin("laguna", "bf16", {"torch_dtype": "bfloat16", "attention_bias": False}, end_tokens=(3, 24)),
    ),
    Row(
        "LiquidAI/LFM2-8B-A1B",
        "lfm2_moe",
        Twin(
            "lfm2_moe",
            "bf16",
            {
                **{"architectures": ["Lfm2MoeForCausalLM"], "torch_dtype": "bfloat16", "conv_bias": False},
                **{"conv_L_cache": 3, "use_expert_bias": True, "norm_topk_prob": True, "rope_theta": 1000000.0},
                "tie_word_embeddings": True,
            },
        ),
    ),
    Row(
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek_v2",
        Twin(
            "deepseek_v2_lite",
            "bf16",
            {
                **{**DEEPSEEK_CODE, "architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16"},
                **{"topk_method": "greedy", "scoring_func": "softmax", "seq_aux": True, "aux_loss_alpha": 0.001},
                **{"ep_size": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "pretraining_tp": 1},
                **{"rope_theta": 10000, "n_group": 1, "topk_group": 1, "transformers_version": "4.33.1"},
                "rope_scaling": {
                    **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
                    **{"original_max_position_embeddings": 16, "type": "yarn"},
                },
            },
        ),
    ),
    Row(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mixtral",
        Twin(
            "mixtral",
            "bf16",
            {
                **NO_TRAINING,
                **{"architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16"},
                **{"transformers_version": "4.36.0", "rope_theta": 1000000.0, "sliding_window": None},
                **{"attention_dropout": 0.0, "use_cache": True},
            },
        ),
    ),
)
MORE = (
    Row(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "llama4",
        Twin(
            "llama4",
            "bf16, vision tower",
            {
                **{"torch_dtype": "bfloat16", "use_qk_norm": True, "rope_theta": 500000.0, "attention_bias": False},
                **{"attn_temperature_tuning": True, "router_jitter_noise": 0.0, "for_llm_compressor": False},
                "rope_scaling": {
                    **{"factor": 4.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
                    "original_max_position_embeddings": 64,
                },
            },
            composite=Composite(
                "language_model.",
                {
                    **{"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},
                    **{"boi_token_index": 200080, "image_token_index": 200092, "tie_word_embeddings": False},
                    "torch_dtype": "bfloat16",
                },
                tower="vision_model.",
            ),
            end_tokens=(3, 5, 8),
        ),
    ),
    Row(
        "allenai/OLMoE-1B-7B-0924",
        "olmoe",
        Twin(
            "olmoe",
            "bf16",
            {
                **{"architectures": ["OlmoeForCausalLM"], "torch_dtype": "bfloat16", "clip_qkv": None},
                **{"norm_topk_prob": False, "rope_scaling": None, "rope_theta": 10000.0, "attention_bias": False},
                **{"output_router_logits": False, "router_aux_loss_coef": 0.01},
            },
        ),
    ),
    Row(
        "nvidia/Qwen3-30B-A3B-NVFP4",
        "qwen3_moe",
        Twin(
            "qwen3_moe",
            "NVFP4 (ModelOpt)",
            {**QWEN3, "rope_theta": 1000000.0},
            form=FORMATS["modelopt-nvfp4"],
            quantization={
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
                **{"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "producer": {"name": "modelopt"}},
                "ignore": ["lm_head", "model.layers.0.mlp.gate"],
            },
        ),
    ),
    Row(
        "moonshotai/Kimi-K2-Thinking",
        "kimi_k2",
        Twin(
            "deepseek_v3",
            "int4 in groups of 32 (compressed-tensors)",
            {**V3, "model_type": "kimi_k2", "rope_theta": 50000.0, "num_nextn_predict_layers": 0},
            form=FORMATS["ct-int4"],
            coded=is_expert,
            quantization={"kv_cache_scheme": None, "ignore": ["lm_head", "re:.*self_attn.*"]},
            reference_type="deepseek_v3",
        ),
    ),
)
"""Further models and forms of the families above."""
