"""Any sequence-classification checkpoint with one output as a scorer of answers."""

import inspect
import math

import torch
import transformers

from data import UserError
from data.messages import messages, shown_prompt
from engine.models import find_model, first_line, load_model, pick_device, pick_dtype


class Classifier:
    """A classifier with its own tokenizer and chat template: called with B prompts and for each a list of
    answers' texts -> list of lists of scores, logits[0] of the whole templated conversation, as transformers
    gives it.

    Its templates write BOS and EOS themselves: none is added. It is loaded in the compute type, whatever
    --quantize says. UserError for a checkpoint that is none, and for a text beyond the context.
    """

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", most: int = 4096):
        self.name, self.most, self.device = name, most, pick_device(device)
        who, auto = f"reward model {name}", transformers.AutoModelForSequenceClassification
        dtype = pick_dtype(dtype, self.device, name)
        source = find_model(name)
        self.tokenizer, model, missing = load_model(auto, source, who, "sequence classifier", dtype=dtype)
        if missing:
            raise UserError(
                f"{who}: has no scalar head ({missing[0]} is missing); is it a plain language model?"
            )
        if model.config.num_labels != 1:
            raise UserError(f"{who}: its head has {model.config.num_labels} outputs; a score is one number")
        self.model = model.to(self.device).eval()
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.pad = model.config.get_text_config().pad_token_id
        self.takes = inspect.signature(model.forward).parameters

    def encode(self, prompt: str | list, answer: str) -> dict[str, list[int]]:
        """Every column of the tokenizer that the model takes: input_ids, and token_type_ids where the model
        has segment embeddings, without which it would read a pair of texts as one.
        """
        if self.tokenizer.chat_template is None:  # encoders such as DeBERTa take a pair of texts
            columns = self.tokenizer("\n".join(m["content"] for m in messages(prompt)), answer)
        else:
            columns = self.tokenizer(self.templated(prompt, answer), add_special_tokens=False)
        return {name: ids for name, ids in columns.items() if name in self.takes}

    def templated(self, prompt, answer):
        turns = [*messages(prompt), {"role": "assistant", "content": answer}]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # see Policy.templated
            raise UserError(
                f"reward model {self.name}: its chat template refuses the prompt {shown_prompt(prompt)} "
                f"({first_line(error)})"
            ) from error

    def tokens(self, prompt: str | list, answer: str) -> int:
        """Length of the whole text, tokens."""
        return len(self.encode(prompt, answer)["input_ids"])

    @torch.no_grad()
    def __call__(self, prompts: list, groups: list) -> list[list[float]]:
        texts = []
        for prompt, group in zip(prompts, groups):
            for answer in group:
                texts.append(self.encode(prompt, answer))
                refuse_longer(len(texts[-1]["input_ids"]), self.context, prompt)
        scores = [0.0] * len(texts)
        for batch in self.batches([len(text["input_ids"]) for text in texts]):
            columns = self.padded([texts[i] for i in batch])
            for i, score in zip(batch, self.model(**columns).logits[:, 0].tolist()):
                scores[i] = score
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"reward model {self.name}: gave a score that is not finite; its weights, or --dtype "
                "bfloat16, "
                "may be at fault"
            )
        scores = iter(scores)
        return [[next(scores) for _ in group] for group in groups]

    def batches(self, lengths):
        """Texts of like lengths -> lists of indices, each of at most `most` tokens with its padding, or one
        text.
        """
        batch = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            # transformers finds the last token by the padding's id, and without one takes one text at a time.
            if batch and (self.pad is None or (len(batch) + 1) * lengths[i] > self.most):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def padded(self, texts):
        """Texts' columns, padded on the right each with its own number -> {name: (N, L)}."""
        longest = max(len(text["input_ids"]) for text in texts)
        filler = {"input_ids": self.pad, "token_type_ids": self.tokenizer.pad_token_type_id}
        columns = {}
        for name in texts[0]:
            rows = [text[name] + [filler.get(name, 0)] * (longest - len(text[name])) for text in texts]
            columns[name] = torch.tensor(rows, device=self.device)
        return columns


def refuse_longer(tokens: int, context: int, prompt: str | list) -> None:
    if tokens > context:
        raise UserError(
            f"the prompt {shown_prompt(prompt)} and its answer have {tokens} tokens, beyond the context of "
            f"{context}; "
            "leave such records out (--max-prompt-tokens, --max-expert-tokens, --max-tokens)"
        )
