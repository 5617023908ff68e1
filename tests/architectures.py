"""Tiny random models of the architectures that must train correctly."""

import torch

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes))


def mistral(**changes):
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SHAPE | {"sliding_window": 4} | changes))


def qwen2(**changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero to begin with, which would hide them
            torch.nn.init.normal_(parameter)
    return model


def qwen3(**changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 8} | changes))


def gemma(**changes):
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**SHAPE | {"head_dim": 8} | changes))


def gemma2(**changes):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    given = {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_implementation": "eager",
             "sliding_window": 4}  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE | given | changes))


def gemma3(**changes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    given = {"head_dim": 8, "sliding_window": 4, "layer_types":
             ["sliding_attention", "full_attention"]}  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | given | changes))


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    given = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**given | changes))


def granite(**changes):
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SHAPE | {"logits_scaling": 8.0} | changes))


# Made -> whether its rows can be packed.
PACKS = {
    llama: True, mistral: True, qwen2: True, qwen3: True, gemma: True, gemma2: False,
    gemma3: True, gpt2: True, granite: True,
}  # fmt: skip
