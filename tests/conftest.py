"""Random models of a few thousand parameters and the dense oracle that scoring and sampling are compared
with.

Run with `python -m pytest`. Weights have a deviation of 0.2, ten times the usual: next to nothing would
depend on attention otherwise.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a plain `pytest`
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach the network

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from policy import Policy  # noqa: E402

# The last two take the generic decoder: rotary on a part of each head and a bias on the output head;
# parallel residuals and a fused qkv.
FAMILIES = ("qwen3", "llama", "qwen2", "mistral", "phi", "gpt_neox")
WORDS = [
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "user",
    "assistant",
    "system",
    "list",
    "3",
    "animals",
    "cat",
    "dog",
]
# all that is left of a text for Qwen2, whose own tokenizer class transformers insists on
WORDS += "abcdefghijklmnopqrstuvwxyz"
WORDS += [f"w{i}" for i in range(97 - len(WORDS))]
END_OF_TEXT, END_OF_TURN = 1, 3
# As Qwen3's: the empty block switches thinking off.
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %} <think> </think>{% endif %}{% endif %}"
)


def write_tokenizer(directory, chat_template=CHATML):
    """pad == eos, as in many checkpoints."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)


def write_model(directory, family, seed=1, **changes):
    torch.manual_seed(seed)
    config = dict(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END_OF_TURN,
        pad_token_id=END_OF_TURN,
        tie_word_embeddings=family == "qwen3",
    )
    if family not in ("phi", "gpt_neox"):
        config |= dict(num_key_value_heads=2, head_dim=16)
    if family == "mistral":
        config |= dict(sliding_window=None)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **config | changes), dtype=torch.float32
    )
    for (
        name,
        p,
    ) in (
        model.named_parameters()
    ):  # transformers initialises these to 0 and 1, where forgetting them would not show
        if "bias" in name or "norm" in name:
            p.data += 0.2 * torch.randn_like(p)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[END_OF_TURN, END_OF_TEXT], pad_token_id=END_OF_TURN
    )
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """model_dir("llama", num_hidden_layers=3) -> directory of a random model with tokenizer, made once."""
    made = {}

    def get(family="qwen3", **changes):
        key = family + repr(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            write_model(made[key], family, **changes)
            write_tokenizer(made[key])
        return str(made[key])

    return get


@pytest.fixture(scope="session")
def load(model_dir):
    """load("llama", quantize="nf4") -> a new Policy, fp32 on the CPU, with random LoRA B matrices unless
    `fresh`.
    """

    def get(family="qwen3", fresh=False, **options):
        policy = Policy.load(
            model_dir(family), **dict(device="cpu", dtype="float32", lora_rank=4, lora_alpha=8) | options
        )
        if not fresh:
            randomise(policy)
        return policy

    return get


@pytest.fixture(scope="session")
def shared(load):
    """shared("llama") -> a Policy as from `load`, made once: for tests that only read it."""
    made = {}
    return lambda family="qwen3": made[family] if family in made else made.setdefault(family, load(family))


@pytest.fixture(scope="session")
def oracle(shared, tmp_path_factory):
    """oracle("llama") -> the same model and adapter in transformers and PEFT alone, with their plain
    attention.
    """
    made = {}

    def get(family="qwen3"):
        if family not in made:
            adapter = tmp_path_factory.mktemp("adapter") / family
            shared(family).save(adapter)
            made[family] = reload(shared(family).source, adapter)
        return made[family]

    return get


def reload(source, adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()


def randomise(policy, seed=0, scale=0.2):
    """LoRA starts at B = 0, where the adapter does nothing and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.trainable().items():
        if "lora_B" in name:
            p.data = scale * torch.randn(p.shape, generator=generator).to(p)


def randomise_all(parameters, seed=3, scale=0.2):
    """A role's adapter and head away from their zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.data = scale * torch.randn(p.shape, generator=generator).to(p)


def dense_logps(model, prompt, completion, temperature=1.0, left=0, right=0):
    """log p of each completion token and the entropy there: one padded sequence through a transformers
    model and a full log_softmax.
    """
    ids = torch.tensor([[END_OF_TURN] * left + prompt + completion + [END_OF_TURN] * right])
    mask = torch.ones_like(ids)
    mask[:, :left] = 0
    mask[:, ids.shape[1] - right :] = 0
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    ).logits[0]
    logp = (logits[left + len(prompt) - 1 :][: len(completion)] / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(completion)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def random_ids(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, len(WORDS), (n,), generator=generator).tolist() for n in lengths]
