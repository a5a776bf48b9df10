"""A PEFT model's answer to TRL's call for log-probabilities, computed by decoder.py on packed pairs."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from trl.trainer.utils import FusedCausalLMOutput

from fitness_dpo.checkpointing import HostRoom, Recomputed
from fitness_dpo.config import LoraConfig
from fitness_dpo.cpu_attention import attend_sequences, sequence_layout
from fitness_dpo.decoder import (
    Adapted,
    Attend,
    Layer,
    Layout,
    Shape,
    after_attention,
    attend_rows,
    attend_split,
    before_attention,
    rms_norm,
    row_layout,
    split_heads,
)  # fmt: skip
from fitness_dpo.graphs import Recorder
from fitness_dpo.logprobs import TokenScores, answer_logps, score_chunk
from fitness_dpo.packing import PACKED, Packed

KNOWN_MODELS = ("llama", "qwen2", "qwen3")
KERNEL_WIDTHS = (32, 64, 128)
FIRST_TORCH_TO_RECORD = "2.8"
"""Earlier ones end the process where a pool of memory is discarded while a recording in it is in use, or know no such pools."""
KNOWN_ROPE = ("default", "linear", "llama3", "yarn")


def obstacle(model: Any, lora: LoraConfig) -> str | None:
    """Why the packed forward cannot serve this model and adapter, or None."""
    config = model.config
    if config.model_type not in KNOWN_MODELS:
        return f"it knows {', '.join(KNOWN_MODELS)}, not {config.model_type}"
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        return "it knows silu and full attention only"
    if config.rope_parameters["rope_type"] not in KNOWN_ROPE:
        return f"it knows {', '.join(KNOWN_ROPE)} rotary embedding, not {config.rope_parameters['rope_type']}"
    others = {
        "lora.dropout": lora.dropout > 0, "lora.use_dora": lora.use_dora, "lora.bias": lora.bias != "none",
        "lora.modules_to_save": lora.modules_to_save is not None,
    }  # fmt: skip
    return next((f"it has no {name}" for name, used in others.items() if used), None)


class PackedForward:
    """Stands before a causal language model's forward: takes the calls that bring packed pairs, passes on all others.

    The reference is the policy without its adapter, so the adapter has to start at zero (`starts_at_base`).
    """

    def __init__(
        self, model: Any, *, compiled: bool, checkpointing: str, whole: torch.nn.Parameter | None = None
    ) -> None:
        """`compiled` also records CUDA graphs, where the GPU runs the kernels and the adapter's parameters are joined to `whole`.
        `checkpointing` is the setting: layers keep their inputs where they are with `true`, and in the host's memory with
        `unsloth`, as Unsloth does."""
        self.model = model.get_base_model()
        self.otherwise = self.model.forward
        self.compiled, self.checkpoints = compiled, checkpointing != "false"
        config, device = self.model.config, self.model.device
        self.shape = Shape(
            config.num_attention_heads, config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.rms_norm_eps,
        )  # fmt: skip
        self.frequencies, self.rope_scale = rope(config, device)
        layers = self.model.model.layers
        self.probe = next(module for module in layers[0].modules() if hasattr(module, "active_adapters"))
        self.tuned = [read_layer(layer, adapted=True) for layer in layers]
        self.base = [read_layer(layer, adapted=False) for layer in layers]
        ready: Any = partial(torch.compile, fullgraph=True) if compiled else lambda part: part
        self.before, self.after, self.chunk = map(ready, (before_attention, after_attention, score_chunk))
        weight = self.model.get_input_embeddings().weight
        self.host: HostRoom | None = None
        if checkpointing == "unsloth" and weight.is_cuda:
            self.host = HostRoom(len(layers), config.hidden_size, weight.dtype)
        group = self.shape.heads // self.shape.key_heads
        self.layout: Callable[[Packed], Layout]
        self.attend: Attend
        kernels = runs_kernels(weight, self.shape.head_width)
        self.attention = "kernels" if kernels else "sequences" if device.type == "cpu" else "rows"
        if kernels:
            from fitness_dpo.attention_kernels import attend_kernel, kernel_layout
            from fitness_dpo.vocabulary_kernel import score_chunk_kernel

            self.layout, self.attend = partial(kernel_layout, group=group), attend_kernel
            self.chunk = score_chunk_kernel
        elif device.type == "cpu":
            self.layout = partial(sequence_layout, group=group, dtype=weight.dtype)
            self.attend = partial(attend_split, ready(split_heads), attend_sequences)
        else:
            self.layout, self.attend = row_layout, partial(attend_split, ready(split_heads), attend_rows)
        self.tuned_scores: Callable[[Packed], TokenScores] = partial(self.score, layers=self.tuned)
        if compiled and kernels and whole is not None and torch.__version__ >= FIRST_TORCH_TO_RECORD:
            self.tuned_scores = Recorder(self.score, self.tuned, whole)
        self.model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(PACKED) is None:
            return self.otherwise(*args, **kwargs)
        labels = kwargs["labels"]
        packed, (rows, width) = Packed(**kwargs[PACKED]), labels.shape
        on = not self.probe.disable_adapters and "default" in self.probe.active_adapters
        with torch.autocast(packed.ids.device.type, enabled=False):
            scores = self.tuned_scores(packed) if on else self.score(packed, self.base)
            places = rows * (width - 1)
            values = torch.stack([value.float() for value in scores]).to(labels.device)
            placed = values.new_zeros(len(scores), places + 1).index_copy(1, packed.places, values)[:, :places]
            log_probs, entropy, mean_logits, is_top1 = placed.view(-1, rows, width - 1)
        return FusedCausalLMOutput(  # 0 where no answer's token stands
            loss=-log_probs.sum() / places, log_probs=log_probs, entropy=entropy, mean_logits=mean_logits,
            is_top1=is_top1.bool(),
        )  # fmt: skip

    def score(self, packed: Packed, layers: list[Layer]) -> TokenScores:
        """Of the answers' tokens."""
        backbone = self.model.model
        x = backbone.embed_tokens(packed.ids)
        angles = packed.positions[:, None, None] * torch.cat([self.frequencies] * 2)
        cos, sin = ((wave * self.rope_scale).to(x.dtype) for wave in (angles.cos(), angles.sin()))
        layout = self.layout(packed)
        self.mark(cos, sin)
        checkpoints = self.checkpoints and torch.is_grad_enabled()
        rooms = self.host(len(x)) if self.host and checkpoints else [None] * len(layers)
        for layer, room in zip(layers, rooms, strict=True):
            run = partial(self.run, cos=cos, sin=sin, layout=layout, layer=layer)
            x = Recomputed.apply(run, room, x, *layer.factors()) if checkpoints else run(x)  # type: ignore[no-untyped-call]
        hidden = rms_norm(x.index_select(0, packed.sources), backbone.norm.weight, self.shape.norm_epsilon)
        return answer_logps(hidden, self.model.get_output_embeddings().weight, packed.targets, self.chunk)

    def mark(self, *tensors: Tensor) -> None:
        """Tell the compiler that their first size varies."""
        if self.compiled:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, layer: Layer) -> Tensor:
        layer = layer.each(unpack)
        self.mark(x)
        qkv = self.before(x, layer, self.shape)
        self.mark(qkv)
        attended = self.attend(qkv, cos, sin, layer, layout, self.shape)
        self.mark(attended)
        result: Tensor = self.after(x, attended, layer, self.shape)
        return result


def runs_kernels(weight: Tensor, head_width: int) -> bool:
    """Whether the project's Triton kernels serve a model with such a weight. An older card (a T4) and 32 bits, whose tiles are
    more than a consumer's card can hold, take torch's own operations."""
    modern = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    known = weight.dtype in (torch.bfloat16, torch.float16) and head_width in KERNEL_WIDTHS
    return modern and known and importlib.util.find_spec("triton") is not None


def rope(config: Any, device: torch.device) -> tuple[Tensor, float]:
    """(head width / 2,) angle per position in radians, and the factor of the waves (Su et al. 2021, eq. 15, and its kin)."""
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device)
        return frequencies, scale
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, width, 2, device=device).float() / width
    return config.rope_parameters["rope_theta"] ** -exponents, 1.0


def starts_at_base(model: Any) -> bool:
    """Whether the fresh adapter changes nothing: B A = 0."""
    return all(
        not (module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()).any()
        for module in model.modules()
        if hasattr(module, "lora_B") and "default" in module.lora_B
    )


def read_layer(module: Any, *, adapted: bool) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        module.input_layernorm.weight,
        read_adapted([attention.q_proj, attention.k_proj, attention.v_proj], adapted=adapted),
        attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        read_adapted([attention.o_proj], adapted=adapted),
        module.post_attention_layernorm.weight,
        read_adapted([mlp.gate_proj, mlp.up_proj], adapted=adapted),
        read_adapted([mlp.down_proj], adapted=adapted),
    )


def read_adapted(modules: list[Any], *, adapted: bool) -> Adapted:
    bases = [getattr(module, "base_layer", module) for module in modules]
    biases = [base.bias for base in bases]
    starts = [sum(base.out_features for base in bases[:place]) for place in range(len(bases))]
    tuned = [
        (module, start)
        for module, start in zip(modules, starts, strict=True)
        if adapted and "default" in getattr(module, "lora_A", {})
    ]
    return Adapted(
        [base.weight for base in bases],
        None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        [module.lora_A["default"].weight for module, _ in tuned],
        [module.lora_B["default"].weight for module, _ in tuned],
        [start for _, start in tuned],
        [module.scaling["default"] for module, _ in tuned],
    )


def unpack(layer: Adapted) -> Adapted:
    """With 4-bit weights unpacked to the compute dtype; others as they are."""
    states = [getattr(weight, "quant_state", None) for weight in layer.weights]
    if states[0] is None:
        return layer
    from bitsandbytes.functional import dequantize_4bit

    return layer._replace(
        weights=[dequantize_4bit(weight.data, state) for weight, state in zip(layer.weights, states, strict=True)]
    )
