"""Gemma 3 270M (Q4_K_M) as transformers computes it in fp32 on gguf's own dequantised weights: the reference of the second real model's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MODEL = "gemma-3-270m"
PROMPT, CONTINUATION = "1, 2, 3, 4, 5,", " 6, 7, 8, 9, 10, 11, 12,"


def load_reference(path: Path) -> Any:
    """A transformers Gemma 3 whose every weight is set from the GGUF file by `gguf.quants.dequantize`, and whose sizes are those of the file's fields."""
    import torch
    from gguf.quants import dequantize
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    reader = _reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("gemma3.")}
    fields["gemma3.vocab_size"] = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    head_dim = fields["gemma3.attention.key_length"]
    config = Gemma3TextConfig(
        vocab_size=fields["gemma3.vocab_size"], hidden_size=fields["gemma3.embedding_length"],
        intermediate_size=fields["gemma3.feed_forward_length"], num_hidden_layers=fields["gemma3.block_count"],
        num_attention_heads=fields["gemma3.attention.head_count"], num_key_value_heads=fields["gemma3.attention.head_count_kv"], head_dim=head_dim,
        query_pre_attn_scalar=head_dim, rms_norm_eps=fields["gemma3.attention.layer_norm_rms_epsilon"],
        sliding_window=fields["gemma3.attention.sliding_window"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": fields["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        max_position_embeddings=fields["gemma3.context_length"], tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        gain = 1.0 if "norm" in tensor.name else 0.0  # GGUF holds Gemma's norms with their one added
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values) - np.float32(gain))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were made on "meta", as was the embedding's scale
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model.eval()


def _reader(path: Path) -> Any:
    """gguf's own reader, which steps over lists: over a vocabulary of 262,144 it takes longer than all that is tested here."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            data, at = self.data.view(np.ndarray).data, orig_offs + 12
            if item == GGUFValueType.STRING:
                for _ in range(count):
                    at += 8 + int.from_bytes(data[at : at + 8], "little")
            else:
                at += count * np.dtype(self.gguf_scalar_to_np[item]).itemsize
            return at - orig_offs, [], [], [GGUFValueType.ARRAY, item]

    return Reader(path)


_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _hugging_face_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
