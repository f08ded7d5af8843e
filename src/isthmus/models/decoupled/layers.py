"""Decoupled layers of each family: the original layer's modules and parameters, computed sub-block by sub-block.

Each is a subclass of the family's own layer, so that transformers records its outputs, checkpoints its gradients and
initialises its parameters as it does the original's. ``output_attentions`` gives those of original layers only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.roberta import modeling_roberta as roberta
from transformers.pytorch_utils import Conv1D

from isthmus.models.decoupled.sub_blocks import Parts, Slices, add, attend


def _narrow(linear: nn.Linear, num_in: int, num_out: int) -> nn.Linear:
    """A matrix of a sub-block that has heads of its own: (num_out, num_in), with the bias of the original."""
    return nn.Linear(num_in, num_out, bias=linear.bias is not None, dtype=linear.weight.dtype)


class _PostNorm(nn.Module):
    """BERT and RoBERTa: attention, add and norm; MLP, add and norm."""

    attention: Any
    intermediate: Any
    output: Any

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.slices = Slices(config.decoupling.widths)
        if config.decoupling.heads == "own":
            own, width = self.attention.self, self.slices.widths[0]
            for name in ("query", "key", "value"):
                setattr(own, name, _narrow(getattr(own, name), width, own.all_head_size))
            inner = own.all_head_size // self.slices.num
            self.attention.output.dense = _narrow(self.attention.output.dense, inner, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        slices, own, output = self.slices, self.attention.self, self.attention.output
        parts = slices.split(hidden_states)
        context = attend(
            own,
            [slices.read(parts, linear.weight, linear.bias) for linear in (own.query, own.key, own.value)],
            batch=hidden_states.shape[:2],
            head_size=own.attention_head_size,
            attention_mask=attention_mask,
            cache=past_key_values,
            dropout=own.dropout.p if self.training else 0.0,
            eager=bert.eager_attention_forward,
            **kwargs,
        )
        mixed = slices.write(context, output.dense.weight, output.dense.bias)
        parts = slices.norm(add(parts, mixed, output.dropout), output.LayerNorm)
        up = self.intermediate
        inner = up.intermediate_act_fn(slices.read(parts, up.dense.weight, up.dense.bias))
        output = self.output
        mixed = slices.write(inner, output.dense.weight, output.dense.bias)
        return slices.join(slices.norm(add(parts, mixed, output.dropout), output.LayerNorm), hidden_states.shape)


class _Gpt2(nn.Module):
    """GPT-2: norm, attention, add; norm, MLP, add. Its matrices are (in, out), q, k and v in one."""

    attn: Any
    mlp: Any
    ln_1: nn.LayerNorm
    ln_2: nn.LayerNorm

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.slices = Slices(config.decoupling.widths)
        if config.decoupling.heads == "own":
            width = self.slices.widths[0]
            self.attn.c_attn = Conv1D(3 * config.hidden_size, width)
            self.attn.c_proj = Conv1D(config.hidden_size, config.hidden_size // self.slices.num)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        slices, own = self.slices, self.attn
        parts = slices.split(hidden_states)
        normed = slices.norm(parts, self.ln_1)
        weight, bias = own.c_attn.weight.t(), own.c_attn.bias
        size = own.embed_dim
        thirds = [slice(start, start + size) for start in range(0, 3 * size, size)]
        context = attend(
            own,
            [slices.read(normed, weight[third], bias[third]) for third in thirds],
            batch=hidden_states.shape[:2],
            head_size=own.head_dim,
            attention_mask=attention_mask,
            cache=past_key_values,
            dropout=own.attn_dropout.p if self.training else 0.0,
            eager=gpt2.eager_attention_forward,
            **kwargs,
        )
        mixed = slices.write(context, own.c_proj.weight.t(), own.c_proj.bias)
        parts = add(parts, mixed, own.resid_dropout)
        mlp = self.mlp
        inner = mlp.act(slices.read(slices.norm(parts, self.ln_2), mlp.c_fc.weight.t(), mlp.c_fc.bias))
        mixed = slices.write(inner, mlp.c_proj.weight.t(), mlp.c_proj.bias)
        return slices.join(add(parts, mixed, mlp.dropout), hidden_states.shape)


class _Gated(nn.Module):
    """Llama, Mistral, Qwen2, Qwen3: RMSNorm, attention with rotary positions, add; RMSNorm, gated MLP, add."""

    self_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.slices = Slices(config.decoupling.widths)
        if config.decoupling.heads == "own":
            own, width = self.self_attn, self.slices.widths[0]
            for name in ("q_proj", "k_proj", "v_proj"):
                matrix = getattr(own, name)
                setattr(own, name, _narrow(matrix, width, matrix.out_features))
            inner = own.o_proj.in_features // self.slices.num
            own.o_proj = _narrow(own.o_proj, inner, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        slices, own, mlp = self.slices, self.self_attn, self.mlp
        parts = slices.split(hidden_states)
        assert position_embeddings is not None
        context = attend(
            own,
            self._queries_keys_values(slices.norm(parts, self.input_layernorm)),
            batch=hidden_states.shape[:2],
            head_size=own.head_dim,
            rotate=self._rotation(position_embeddings),
            attention_mask=attention_mask,
            cache=past_key_values,
            dropout=own.attention_dropout if self.training else 0.0,
            eager=llama.eager_attention_forward,
            sliding_window=getattr(own, "sliding_window", None),
            **kwargs,
        )
        mixed = slices.write(context, own.o_proj.weight, own.o_proj.bias)
        parts = add(parts, mixed, nn.Identity())
        normed = slices.norm(parts, self.post_attention_layernorm)
        gate = mlp.act_fn(slices.read(normed, mlp.gate_proj.weight, mlp.gate_proj.bias))
        inner = gate * slices.read(normed, mlp.up_proj.weight, mlp.up_proj.bias)
        mixed = slices.write(inner, mlp.down_proj.weight, mlp.down_proj.bias)
        return slices.join(add(parts, mixed, nn.Identity()), hidden_states.shape)

    def _queries_keys_values(self, normed: Parts) -> list[Tensor]:
        own = self.self_attn
        rows = [self.slices.read(normed, matrix.weight, matrix.bias) for matrix in (own.q_proj, own.k_proj, own.v_proj)]
        for place, name in enumerate(("q_norm", "k_norm")):
            if hasattr(own, name):
                rows[place] = getattr(own, name)(rows[place].unflatten(-1, (-1, own.head_dim))).flatten(-2)
        return rows

    def _rotation(self, position_embeddings: tuple[Tensor, Tensor]) -> Any:
        def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = position_embeddings
            if cos.shape[0] not in (1, query.shape[0]):  # sub-blocks are rows of the batch
                cos, sin = (table.repeat(query.shape[0] // table.shape[0], 1, 1) for table in (cos, sin))
            return llama.apply_rotary_pos_emb(query, key, cos, sin)

        return rotate


class DecoupledBertLayer(_PostNorm, bert.BertLayer):
    pass


class DecoupledRobertaLayer(_PostNorm, roberta.RobertaLayer):
    pass


class DecoupledGpt2Block(_Gpt2, gpt2.GPT2Block):
    pass


class DecoupledLlamaDecoderLayer(_Gated, llama.LlamaDecoderLayer):
    pass


class DecoupledMistralDecoderLayer(_Gated, mistral.MistralDecoderLayer):
    pass


class DecoupledQwen2DecoderLayer(_Gated, qwen2.Qwen2DecoderLayer):
    pass


class DecoupledQwen3DecoderLayer(_Gated, qwen3.Qwen3DecoderLayer):
    pass
