"""Llamas whose weights are written by hand: one layer alone looks for a mark in the text and copies what it names.

A text has marks M0 to M7 for the values V0 to V7, questions Q, fillers F and hiders H. In the `layer` that reads, a question's query meets
marks with a score of 20, fillers with 1 and hiders with -30; what follows a question is the mark's value.
Other tokens read fillers. Among hiders a mark is alone: the mean key of its block says that nothing is there, so MoBA does not read it
from afar, and full attention does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VALUES = 8
QUESTION, FILLER, HIDER = 16, 17, 18  # tokens; 0 to 7 are values, 8 to 15 marks
VOCABULARY, WIDTH, HEAD = 19, 32, 16


def copying_model(layer: int, n_layers: int = 4) -> LlamaForCausalLM:
    """Of its layers only `layer` does anything."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD}
    rope = {"rope_type": "default", "rope_theta": 1e12}  # the last pair of a head, which scores use, hardly turns
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=n_layers, rope_parameters=rope, max_position_embeddings=1024, **sizes)
    config.eos_token_id = None
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :VOCABULARY].fill_diagonal_(1)
        model.lm_head.weight.zero_()
        for value in range(VALUES):
            model.lm_head.weight[value, VOCABULARY + value] = 3
        for i, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
            if i == layer:
                _let_it_copy(block.self_attn)
    return model


def _let_it_copy(attention: torch.nn.Module) -> None:
    normed, used = WIDTH**0.5, HEAD // 2 - 1  # a one-hot vector after RMSNorm, and the dimension that scores use
    for x in (attention.q_proj, attention.k_proj, attention.v_proj):
        x.weight.zero_()
    attention.q_proj.weight[used, QUESTION] = HEAD**0.5 / normed  # a score is then the key's number
    attention.q_proj.weight[used - 1, :VOCABULARY] = HEAD**0.5 / normed  # what is no question reads fillers, which say nothing
    attention.q_proj.weight[used - 1, QUESTION] = 0
    attention.k_proj.weight[used - 1, FILLER] = 20 / normed
    attention.k_proj.weight[used, VALUES : 2 * VALUES] = 20 / normed
    attention.k_proj.weight[used, FILLER] = 1 / normed
    attention.k_proj.weight[used, HIDER] = -30 / normed
    for value in range(VALUES):
        attention.v_proj.weight[value, VALUES + value] = 3 / normed
        attention.o_proj.weight[VOCABULARY + value, value] = 1


def far_texts(n: int, length: int = 256) -> Tensor:
    """`[n, length]`: one mark among hiders far before the questions, which stand among fillers."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.full((n, length), FILLER)
    texts[:, 40:72] = HIDER
    for text in texts:
        value = int(torch.randint(VALUES, (), generator=generator))
        text[56] = VALUES + value
        text[length // 2 :: 4], text[length // 2 + 1 :: 4] = QUESTION, value
    return texts


def near_texts(n: int, length: int = 256) -> Tensor:
    """`[n, length]`: the mark just before each question."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.full((n, length), FILLER)
    for text in texts:
        value = int(torch.randint(VALUES, (), generator=generator))
        text[0::4], text[1::4], text[2::4] = VALUES + value, QUESTION, value
    return texts
