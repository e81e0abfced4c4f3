"""Sequence classifiers as scorers, against transformers' own forward pass and pipeline."""

import conftest
import pytest
import torch
import transformers
from conftest import CHATML, END_OF_TEXT, write_tokenizer
from tokenizers import processors

import reward_model
from data import messages

CLASSIFIER = dict(
    vocab_size=len(conftest.WORDS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def write_classifier(directory, labels=1, pad=0, template=CHATML, bos=False, **changes):
    """A random Qwen3ForSequenceClassification with tokenizer. bos: its tokenizer puts one in front of every
    text, as Llama's.
    """
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**CLASSIFIER | changes, num_labels=labels, pad_token_id=pad)
    model = transformers.Qwen3ForSequenceClassification(config)
    model.save_pretrained(directory)
    write_tokenizer(directory, template)
    if bos:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)]
        )
        tokenizer.save_pretrained(directory)
    return model.eval()


PROMPTS = [
    "list 3 animals",
    [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "dog w20"},
        {"role": "user", "content": "w3 w4 w5"},
    ],
]
ANSWERS = [["cat dog", "w7 w8 w9 w10", "cat"], ["w11", "list list list"]]


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("most", [1, 50, 4096])
def test_a_classifiers_score_is_transformers_own(pad, most, tmp_path):
    model = write_classifier(tmp_path, pad=pad)
    scorer = reward_model.load_scorer(str(tmp_path), most=most, device="cpu", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt, group, row in zip(PROMPTS, ANSWERS, scorer(PROMPTS, ANSWERS), strict=True):
        for answer, score in zip(group, row, strict=True):
            turns = messages.messages(prompt) + [{"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            assert (
                score == pytest.approx(model(ids).logits.item(), abs=1e-5)
                and scorer.tokens(prompt, answer) == ids.shape[1]
            )


def test_bos_is_not_doubled(tmp_path):
    """Llama's template writes BOS, and its tokenizer writes it again in front of the templated text."""
    write_classifier(tmp_path, template="<|endoftext|> " + CHATML, bos=True)
    scorer = reward_model.load_scorer(str(tmp_path), device="cpu", dtype="float32")
    assert scorer.tokenizer.encode("cat")[0] == END_OF_TEXT
    assert scorer.encode("cat", "dog")["input_ids"].count(END_OF_TEXT) == 1


def test_without_a_template_a_pair_of_texts_is_scored(tmp_path):
    write_classifier(tmp_path, template=None)
    scorer = reward_model.load_scorer(str(tmp_path), device="cpu", dtype="float32")
    assert scorer.encode("cat w3", "dog")["input_ids"] == scorer.tokenizer("cat w3", "dog")["input_ids"]


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_classifier_of_pairs_sees_which_text_is_which(family, tmp_path):
    """Segment embeddings were all those of the first text: an ELECTRA gave 7.71 instead of 10.92."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *conftest.WORDS[10:]]
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(intermediate_size=64, max_position_embeddings=64, type_vocab_size=2, initializer_range=0.5)
    config = transformers.AutoConfig.for_model(family, **sizes, num_labels=1, pad_token_id=0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)

    scorer = reward_model.load_scorer(str(tmp_path), device="cpu", dtype="float32")
    pipe = transformers.pipeline("text-classification", str(tmp_path), device="cpu", function_to_apply="none")
    prompts = ["w1 w2", "w3"]
    for prompt, group, row in zip(prompts, ANSWERS, scorer(prompts, ANSWERS), strict=True):
        theirs = [pipe({"text": prompt, "text_pair": answer})["score"] for answer in group]
        assert row == pytest.approx(theirs, abs=1e-5)
    padded = scorer.padded([scorer.encode("w1", "w2 w3"), scorer.encode("w1", "w2 w3 w4 w5")])
    assert padded["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert padded["attention_mask"].tolist()[0] == [1] * 6 + [0, 0]
