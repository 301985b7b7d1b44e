"""The T5 of `transformers` with the weights of a `Generator`, whose position embeddings have to be zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from qbert_ray.sequence.decoder import DecoderLayer, EncoderLayer, Generator


class LevelT5(T5ForConditionalGeneration):
    """T5 whose step l chooses among the codes of level l alone; T5 by itself has one softmax over all tokens."""

    num_levels, codebook_size = 0, 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        past = named.get("past_key_values")
        before = int(past.get_seq_length()) if past is not None else 0
        result = super().forward(*arguments, **named)
        level = torch.arange(result.logits.shape[1]) + before
        token = torch.arange(result.logits.shape[2])
        result.logits = result.logits.masked_fill(token // self.codebook_size != level[:, None], -torch.inf)
        return result


def t5_of(model: Generator) -> LevelT5:
    """A T5 that gives the same scores."""
    start = model.start
    config = T5Config(
        vocab_size=start + 2,
        d_model=model.table.weight.shape[1],
        d_kv=model.head_width,
        d_ff=model.encoder[0].ffn.up.out_features,
        num_layers=len(model.encoder),
        num_decoder_layers=len(model.decoder),
        num_heads=model.num_heads,
        dropout_rate=float(model.dropout.threshold) / 256,
        feed_forward_proj="relu",
        pad_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=start + 1,
        bos_token_id=None,
    )
    twin = LevelT5(config)
    twin.num_levels, twin.codebook_size = model.num_levels, model.codebook_size
    with torch.no_grad():
        twin.shared.weight.copy_(model.table.weight)
        for stack, layers, norm in ((twin.encoder, model.encoder, model.encoder_norm), (twin.decoder, model.decoder, model.decoder_norm)):
            stack.final_layer_norm.weight.copy_(norm.weight)
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
            for block, layer in zip(stack.block, layers, strict=True):
                _copy(block, layer, model.head_width**0.5)
    return twin.eval()


def _copy(block: Any, layer: EncoderLayer | DecoderLayer, scale: float) -> None:
    """T5 does not divide by the root of a head's width."""
    own, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
    norm.weight.copy_(layer.norm_attention.weight)
    query, key, value = layer.query_key_value.weight.chunk(3)
    _fill((own.q, query / scale), (own.k, key), (own.v, value), (own.o, layer.out.weight))
    if isinstance(layer, DecoderLayer):
        cross = block.layer[1].EncDecAttention
        block.layer[1].layer_norm.weight.copy_(layer.norm_cross.weight)
        key, value = layer.cross_key_value.weight.chunk(2)
        _fill((cross.q, layer.cross_query.weight / scale), (cross.k, key), (cross.v, value), (cross.o, layer.cross_out.weight))
    last = block.layer[-1]
    last.layer_norm.weight.copy_(layer.norm_ffn.weight)
    _fill((last.DenseReluDense.wi, layer.ffn.up.weight), (last.DenseReluDense.wo, layer.ffn.down.weight))


def _fill(*pairs: tuple[Any, Tensor]) -> None:
    for module, weight in pairs:
        module.weight.copy_(weight)
