"""What training on the tiny tasks and the tiny model relies on. Nothing is sampled here: how well the model
follows instructions is said, as measured, in data/make_tiny.py.

    python -m pytest tests/test_tiny.py      # half a minute, most of it the recipe, run twice for three steps
"""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from data.constraints import constraint_results
from data.make_tiny import END_OF_TEXT, END_OF_TURN, corpus_records, make_tiny, noisy_answer
from data.tiny_tasks import MOST, VERBS, answer, tiny_tasks
from reward import verifier

TINY = Path(__file__).parent.parent / "data" / "tiny"


@pytest.fixture(scope="module")
def records():
    return tiny_tasks("train", 2000) + tiny_tasks("heldout", 1000)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_splits_share_no_combination_whatever_the_verb_and_the_seed():
    """98.6 % of the held-out prompts once asked for what a training prompt asked for, with another verb."""
    asked = {}
    for split in ("train", "heldout"):
        asked[split] = set()
        for seed in range(4):
            for r in tiny_tasks(split, 4000, seed):
                verb, combination = r["prompt"].split(" ", 1)
                assert verb in VERBS
                asked[split] |= {combination, json.dumps(r["constraints"])}
    assert len(asked["heldout"]) > 4000 and not asked["train"] & asked["heldout"]


def test_the_model_never_saw_a_held_out_combination():
    seen = {json.dumps(r["constraints"]) for r in corpus_records()}
    heldout = tiny_tasks("heldout", MOST["heldout"])
    assert len(seen) > 5000 and not any(json.dumps(r["constraints"]) in seen for r in heldout)


def test_the_seed_alone_decides_and_a_smaller_n_is_a_prefix():
    assert tiny_tasks("train", 200, seed=1) == tiny_tasks("train", 300, seed=1)[:200]
    assert tiny_tasks("train", 200, seed=1) != tiny_tasks("train", 200, seed=2)
    # Pinned: Python's hash() or a set's order would change from one process to the next.
    assert (
        tiny_tasks("heldout", 1)[0]["prompt"]
        == "name 2 trees , without ash , in alphabetical order , in upper case"
    )


def test_prompts_are_distinct_until_the_pool_is_empty():
    for split, most in MOST.items():
        assert len({r["prompt"] for r in tiny_tasks(split, most)}) == most > 10_000
    for wrong in (("test", 1), ("train", -1), ("heldout", MOST["heldout"] + 1)):
        with pytest.raises(ValueError):
            tiny_tasks(*wrong)


def test_references_are_good_but_not_perfect_and_rejected_ones_are_worse(records):
    met = {
        key: [constraint_results(r[key], r["constraints"]) for r in records] for key in ("chosen", "rejected")
    }
    share = {key: sum(map(sum, rows)) / sum(map(len, rows)) for key, rows in met.items()}
    assert 0.77 < share["chosen"] < 0.81  # as the docstring of data/tiny_tasks.py says
    assert 0.31 < share["rejected"] < 0.36
    assert all(sum(good) > sum(bad) for good, bad in zip(met["chosen"], met["rejected"]))


def test_an_answer_meets_exactly_what_it_follows(records):
    """The verifier and the generator are written apart: each constraint alone broken, the others hold, and
    only a full answer is paid."""
    rng = random.Random(0)
    for r in records[:1000]:
        everything = [True] * len(r["constraints"])
        good = answer(r["constraints"], everything, rng)
        assert constraint_results(good, r["constraints"]) == everything
        assert verifier([r["prompt"]], [good], constraints=[r["constraints"]]) == [1.0], (r["prompt"], good)
        for i in range(len(everything)):
            follow = everything[:i] + [False] + everything[i + 1 :]
            assert constraint_results(answer(r["constraints"], follow, rng), r["constraints"]) == follow


def test_tokenizer_round_trip(records, tokenizer):
    for r in records:
        for text in (r["prompt"], r["chosen"], r["rejected"], r["chosen"].upper()):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer):
    chat = [{"role": "user", "content": "list 2 trees"}]
    prompt = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert prompt == "<|im_start|>user\nlist 2 trees<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nlist 2 trees<|im_end|>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt, add_special_tokens=False)) == [
        "<|im_start|>",
        "user",
        "list",
        "2",
        "trees",
        "<|im_end|>",
        "<|im_start|>",
        "assistant",
    ]


def test_special_tokens_and_files(tokenizer):
    config, generation = AutoConfig.from_pretrained(TINY), GenerationConfig.from_pretrained(TINY)
    ends = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    assert generation.eos_token_id == ends == config.eos_token_id and len(set(ends)) == 2
    assert tokenizer.eos_token_id == ends[0] and tokenizer.pad_token_id not in ends
    assert not {"temperature", "top_k", "top_p", "do_sample"} & set(
        json.loads((TINY / "generation_config.json").read_text())
    )
    assert config.model_type == "qwen3" and config.tie_word_embeddings and config.vocab_size == len(tokenizer)
    assert [p.name for p in TINY.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth")] == [
        "model.safetensors"
    ]
    assert (TINY / "model.safetensors").stat().st_size < 8e6


def test_the_corpus_is_neither_perfect_nor_hopeless(records):
    rng = random.Random(0)
    texts = [noisy_answer(r, rng) for r in records]
    paid = verifier([r["prompt"] for r in records], texts, constraints=[r["constraints"] for r in records])
    assert 0.2 < sum(paid) / len(paid) < 0.5


def test_the_recipe_repeats_itself_and_leaves_torch_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        make_tiny(run, steps=3, log=lambda line: None)
    for file in sorted(runs[0].iterdir()):
        assert file.read_bytes() == (runs[1] / file.name).read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
