"""Tiny random models of many architectures, with what has to be said about each before it can be guarded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCAB = 60
_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0,
}  # fmt: skip
_T5 = {
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_LATENT = {
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_SHARED_KV = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}  # fmt: skip

_ATTENTION = r".*(self_attn|attention|attn)\.(q_proj|k_proj|v_proj|o_proj)"
_ENCODER = r".*encoder\..*"


@dataclass(frozen=True)
class Architecture:
    """One row of the sweep.

    Attributes:
        name: the model type in Transformers. settings: what its tiny configuration needs beside the common ones.
        target: ``target_modules`` of the layers that can be guarded.
        head: "causal", "masked" or "seq2seq".
        refused: sides of padding on which collection refuses the model, because its real tokens see the padding.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    target: str = "all-linear"
    head: str = "causal"
    refused: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The same model whenever it is built, in float32, with random biases."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

        known = AutoConfig.for_model(self.name)
        common = {name: value for name, value in _SMALL.items() if _settable(known, name)}
        config = AutoConfig.for_model(self.name, **{**common, **self.settings})
        cls = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls[self.head].from_config(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.2)
        return model.float().eval()

    def batch(self, prompts: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
        """A padded batch; padding is a token that would change every statistic if it counted."""
        width = max(map(len, prompts))
        ids, mask = torch.full((len(prompts), width), VOCAB - 1), torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            here = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
            ids[row, here], mask[row, here] = torch.tensor(prompt), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.head == "seq2seq":
            batch["decoder_input_ids"] = torch.zeros(len(prompts), 2, dtype=torch.long)
        return batch


def _settable(config: Any, name: str) -> bool:
    """Whether the configuration has this setting; some have it as a property that raises, or without a setter."""
    try:
        getattr(config, name)
        setattr(config, name, getattr(config, name))
    except Exception:
        return False
    return True


def _rows(names: str, **about: Any) -> list[Architecture]:
    return [Architecture(name, **about) for name in names.split()]


ARCHITECTURES = [
    *_rows(
        "apertus arcee biogpt bitnet cohere cohere2 diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 "
        "granite helium hunyuan_v1_dense llama ministral mistral nemotron olmo olmo2 olmo3 persimmon phi phi3 qwen2 "
        "qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma"
    ),
    *_rows("gpt2 gpt_bigcode", settings=_GPT2),
    *_rows("openai-gpt", settings=_GPT2),
    *_rows("codegen gptj", settings={**_GPT2, "rotary_dim": 8}),
    Architecture("bloom", {"n_layer": 2, "n_head": 4}),
    Architecture("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64}),
    Architecture("deepseek_v2", {**_LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                                 "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
                 r".*(q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)"),
    Architecture("falcon"),
    Architecture("gemma3n_text", {**_SHARED_KV, "laurel_rank": 4, "altup_num_inputs": 2,
                                  "activation_sparsity_pattern": [0.0] * 4}, _ATTENTION),
    Architecture("gemma4_text", {**_SHARED_KV, "global_head_dim": 8}, _ATTENTION),
    Architecture("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Architecture("gpt_neox"),
    Architecture("minicpm3", _LATENT, r".*(q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj|up_proj|down_proj)"),
    Architecture("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    Architecture("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    # Experts in one parameter: the attention alone.
    Architecture("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, _ATTENTION),
    Architecture("granitemoe", {"num_local_experts": 4}, _ATTENTION),
    Architecture("mixtral", {"num_local_experts": 4}, _ATTENTION),
    *_rows("olmoe qwen2_moe qwen3_moe", settings=_EXPERTS, target=_ATTENTION),
    # Recurrences and convolutions.
    Architecture("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2,
                           "mamba_d_state": 8, "mamba_chunk_size": 8}, r".*(in_proj|q_proj|v_proj|up_proj|down_proj)"),
    Architecture("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
                               "mamba_d_state": 8, "mamba_chunk_size": 8}, r".*(in_proj|q_proj|v_proj|up_proj)"),
    Architecture("falcon_mamba", {"state_size": 8}, r".*in_proj"),
    Architecture("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False,
                           "mamba_d_state": 8, "mamba_dt_rank": 4}, r".*(in_proj|q_proj|v_proj|up_proj|down_proj)"),
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Architecture("mamba", {"state_size": 8}, r".*in_proj"),
    Architecture("mamba2", {"num_heads": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}, r".*in_proj"),
    *_rows("qwen3_5_text", settings=_DELTA_NET),
    Architecture("qwen3_next", {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 24}, _ATTENTION),
    Architecture("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16,
                                     "num_key_value_heads": 1}, refused=("left",)),
    # Without rescaling, which changes weights in evaluation and is refused as such.
    Architecture("rwkv", {"attention_hidden_size": 32, "rescale_every": 0}, refused=("left",)),
    # Encoders.
    *_rows("bert ernie eurobert megatron-bert", head="masked"),
    # Their positions are counted from the tokens that are not pad_token_id.
    *_rows("camembert mpnet roberta roberta-prelayernorm xlm-roberta", head="masked", refused=("left",)),
    Architecture("albert", {"embedding_size": 16}, head="masked"),
    Architecture("deberta-v2", {"relative_attention": True, "position_buckets": 8}, head="masked"),
    Architecture("distilbert", {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}, head="masked"),
    Architecture("electra", {"embedding_size": 32}, head="masked"),
    Architecture("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 16}, head="masked"),
    # Encoders of encoder-decoder models.
    *_rows("bart marian pegasus", settings=_BART, target=_ENCODER, head="seq2seq", refused=("left",)),
    *_rows("mt5 t5", settings=_T5, target=_ENCODER, head="seq2seq"),
]  # fmt: skip
