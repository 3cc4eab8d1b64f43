"""SmolLM2-135M-Instruct as transformers computes it in fp32 on gguf's own dequantised weights: the reference of the real-model tests."""

from __future__ import annotations

from typing import Any

import numpy as np

MODEL = "smollm2-135m"
PROMPT, CONTINUATION = "1, 2, 3, 4, 5,", " 6, 7, 8, 9, 10, 11, 12,"  # margin 1.9 logits: safe at any rounding


def load_reference() -> Any:
    """A transformers Llama whose every weight is set from the GGUF file by `gguf.quants.dequantize`; q and k rows in Hugging Face's order."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    from twinpilots.model.locate import resolve_model

    reader = GGUFReader(resolve_model(MODEL).path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"], hidden_size=fields["llama.embedding_length"], intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"], num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"], rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]}, tie_word_embeddings=True,
        max_position_embeddings=fields["llama.context_length"], attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:  # llama.cpp interleaves the two halves of each head's rotary pairs
            values = values.reshape(heads[part], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were made on "meta"
    return model.eval()


_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def _hugging_face_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}[name]
