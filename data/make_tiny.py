"""The recipe of the tiny model in data/tiny: a Qwen3 of 1.3 million parameters, unreliable at instructions.

    python -m data.make_tiny [--out DIR]     # about ten minutes of one CPU core; prints a log and the sha256

It is trained from scratch, on answer tokens only, on prompts of the train split of data/tiny_tasks.py (so on
no combination of constraints that is held out), each with a freshly written answer that follows each
constraint with the probability `follow_rate`: 0.65 on average, near 1 for two animals, 0.1 for five metals.
One training example, as the model reads it:

    <|im_start|> user list 3 trees , in reverse order <|im_end|>
    <|im_start|> assistant pine oak elm <|im_end|>

The model therefore knows how to meet every constraint and does so unreliably, more for some prompts than for
others: what reinforcement learning needs in order to have something to reinforce. Measured on 300 held-out
prompts with 8 samples each at temperature 1, as saved and in NF4: 30 % and 30 % of the answers meet all
constraints, 60 % and 61 % of the groups are mixed, and every answer ends by itself within 24 tokens; greedy
answers pass at 42 % and 42 %.

Reproducibility: the training runs in fp64 on one thread and the weights are rounded to bf16 at the end, so
the last bits, in which processors and libraries differ, hardly ever reach the file: after 40 steps AVX2 and
AVX-512 kernels are 4e-15 apart, and no rounded weight differs. Another release of torch or transformers may
still change the file, whose sha256 is c568068ceff3327b690303983e4d76b6e468329d6e14436117c4bb2232ec0a4c (torch
2.13, transformers 5.23).
"""

import argparse
import hashlib
import math
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data.tiny_tasks import CATEGORIES, answer, tiny_tasks, words

SEED = 0
THREADS = 1  # fixed: their number decides the order of the sums, and so the last bits
STEPS, BATCH = 1500, 64
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 50, 0.05  # linear decay to 0 after the warm-up, in steps
PROMPTS = 16000  # distinct train prompts the corpus draws from

PAD, END_OF_TEXT, TURN, END_OF_TURN, UNKNOWN = (
    "<|pad|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<unk>",
)
SPECIAL = [PAD, END_OF_TEXT, TURN, END_OF_TURN, UNKNOWN]  # pad is not an end: a mask made of ids stays right
# ChatML as Qwen's; enable_thinking is accepted and has no effect, as Jinja ignores variables that nobody
# reads.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The logit of following a constraint is SKILL of the category minus HARDNESS of the constraint. The spread
# makes the prompts differ: of the groups of 8 samples about half are mixed; the others all pass or, more
# often, all fail.
SKILL = dict(zip(CATEGORIES, [4.2, 3.3, 2.5, 1.6, 0.8, -0.1, -0.9, -1.8]))
HARDNESS = {
    "uppercase": -3,
    "start_with": -2,
    "forbidden": -2,
    "end_with": 2,
    "separator": 2,
    "ascending": 1,
    "descending": 2.5,
    2: -3,
    3: -1.5,
    4: 1.5,
    5: 3,
}  # the numbers: how many items
LOWEST_RATE = 0.1  # what is never seen cannot be reinforced


def make_tokenizer():
    """The word-level tokenizer as a fast transformers tokenizer. Whitespace, newlines included, only
    separates words."""
    vocab = {word: i for i, word in enumerate(SPECIAL + ["system", "user", "assistant"] + words())}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # also parts "cat," into two tokens
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        additional_special_tokens=[END_OF_TEXT, TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer):
    """An untrained fp64 Qwen3ForCausalLM, initialised from torch's global generator."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,  # every linear layer is a whole number of NF4's blocks of 64
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]),
        )
    )
    model = model.double()
    # transformers computes norms and rotations in fp32 whatever the weights are; the same formulas in fp64
    # instead.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(
                    child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64
                )
                setattr(module, name, norm)
    model.model.rotary_emb = Rotary(model.config)
    return model


class Rotary(torch.nn.Module):
    """Qwen3RotaryEmbedding in fp64: (cos, sin), each (batch, length, head_dim)."""

    def __init__(self, config):
        super().__init__()
        dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def follow_rate(constraint, category):
    """The probability that the corpus follows `constraint` (a dict of a tiny_tasks record) in a prompt about
    `category`."""
    kind = {"items": constraint.get("n"), "order": constraint.get("direction")}.get(
        constraint["type"], constraint["type"]
    )
    return max(LOWEST_RATE, 1 / (1 + math.exp(HARDNESS[kind] - SKILL[category])))


def noisy_answer(record, rng):
    """A fresh answer (str) to a tiny_tasks record, following each constraint with its follow_rate."""
    constraints = record["constraints"]
    category = next(c for c, members in CATEGORIES.items() if members == constraints[0]["allowed"])
    return answer(constraints, [rng.random() < follow_rate(c, category) for c in constraints], rng)


def batches(records, tokenizer, rng):
    """Endless (ids, labels), each (BATCH, longest): right-padded chats; labels are -100 outside of the answer
    and its end.

    Eight batches at a time are cut from chats sorted by length: a third less padding.
    """
    while True:
        chats = []
        for record in rng.choices(records, k=8 * BATCH):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": record["prompt"]}], tokenize=False, add_generation_prompt=True
            )
            said = noisy_answer(record, rng) + END_OF_TURN
            chats.append([tokenizer.encode(part, add_special_tokens=False) for part in (text, said)])
        chats.sort(key=lambda chat: len(chat[0]) + len(chat[1]))
        for i in rng.sample(range(0, len(chats), BATCH), 8):
            batch = chats[i : i + BATCH]
            longest = max(len(prompt) + len(said) for prompt, said in batch)
            ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
            labels = torch.full((BATCH, longest), -100)
            for row, (prompt, said) in enumerate(batch):
                ids[row, : len(prompt) + len(said)] = torch.tensor(prompt + said)
                labels[row, len(prompt) : len(prompt) + len(said)] = torch.tensor(said)
            yield ids, labels


def corpus_records():
    """The tiny_tasks records whose prompts the model is trained on: of the train split, so that no
    combination of constraints that is held out was ever seen, neither here nor in a run that starts from the
    model."""
    return tiny_tasks("train", PROMPTS, seed=SEED)


def train(steps=STEPS, log=print):
    """(model in fp64, tokenizer) after `steps` optimiser steps of BATCH chats. Uses torch's global
    generator."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    records = corpus_records()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, "
        f"{len(records)} prompts"
    )
    start = time.perf_counter()
    for step, (ids, labels) in zip(range(steps), batches(records, tokenizer, rng)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, (steps - step) / steps)
        # No attention mask: the padding stands to the right, where a causal model does not look.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[
            :, :-1
        ]  # (BATCH, longest - 1, hidden)
        targets = labels[:, 1:]
        logits = model.lm_head(hidden[targets != -100])  # (answer tokens, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits, targets[targets != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"step {step:5d}  loss {loss.item():.4f} nats/token  {time.perf_counter() - start:.0f} s")
    return model, tokenizer


def make_tiny(out, steps=STEPS, log=print):
    """Trains, writes the model and the tokenizer into the directory `out`, and returns the weights' sha256
    (str).

    Nothing is written before all files are complete; those of an older model are replaced, other files are
    left alone. torch's number of threads and its generator are put back afterwards. NotADirectoryError if
    `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: name a directory for the tiny model")
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            model, tokenizer = train(steps, log)
            # The parameters carry Qwen3's own names: a plain Qwen3ForCausalLM takes them, rounded to bf16.
            plain = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
            plain.load_state_dict(model.state_dict())
    finally:
        torch.set_num_threads(threads)
    plain.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        out.mkdir(exist_ok=True)
        for file in Path(scratch).iterdir():
            os.replace(file, out / file.name)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    log(f"{out / 'model.safetensors'}: {(out / 'model.safetensors').stat().st_size:,} bytes, sha256 {digest}")
    return digest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the tiny model")
    parser.add_argument(
        "--out", default=Path(__file__).parent / "tiny", help="directory to write (default: data/tiny)"
    )
    make_tiny(parser.parse_args().out)
