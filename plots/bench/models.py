"""Models of random weights in the shapes of SmolLM2-135M and Qwen3-0.6B: speed and memory ask for no more."""

import torch
import transformers

SMOLLM2 = dict(
    model_type="llama",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    eos_token_id=2,
)
QWEN3 = dict(  # without its 28 layers: a few show what they cost
    model_type="qwen3",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
SHALLOW = dict(QWEN3, num_hidden_layers=4)
NARROW = dict(  # little beside its vocabulary, so that a tensor of tokens x vocabulary would stand out
    QWEN3,
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
ONE_LAYER = dict(QWEN3, num_hidden_layers=1, vocab_size=2**16)


def random_model(folder, tokenizer, **config):
    """A causal LM of random weights with a borrowed tokenizer, written to `folder`."""
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    made.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
