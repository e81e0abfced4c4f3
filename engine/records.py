"""The records of a run: which are read, which fit into the model's context, and their token ids."""

import math
import sys

from data import UserError, load_records


def read_records(c, method, verified):
    """The prompts that a run trains on and those that it is evaluated on -> two lists of records.

    c: its settings; verified: whether the reward reads `constraints`. A run shorter than one pass over the
    data
    reads only the records it will use; where long ones are left out, others take their place, so then all are
    read. UserError where records lack a column that the reward or the method reads.
    """
    level = "tiny" if c.model == "tiny" else "chat"
    all_of_them = c.max_prompt_tokens or c.max_expert_tokens
    wanted = math.inf if all_of_them else c.steps * c.prompts_per_step
    training = load_records(c.data, "train", wanted, seed=c.seed, level=level)
    wanted = math.inf if all_of_them else c.eval_prompts
    held_out = load_records(c.data, "heldout", wanted, seed=0, level=level)
    if verified and not all("constraints" in r for r in training + held_out):
        raise UserError(
            f"data {c.data}: has no 'constraints' for the verifier to check; use --data tasks, or "
            "another --reward"
        )
    for record in training if method.needs_rejected else ():
        if not isinstance(record.get("rejected"), str):
            raise UserError(
                f"data {c.data}: {method.name} needs a 'rejected' answer in every record; the one of "
                f"the prompt {str(record['prompt'])[:60]!r} has none"
            )
    return training, held_out


def encode_records(training, held_out, policy, c, method):
    """Token ids of all prompts and answers that a run can meet, before anything is trained -> two lists.

    Each record gains "prompt_ids", "expert_ids" and "record_index". Records longer than the flags allow are
    left out and counted on stderr; UserError where the others do not fit into the model's context.
    """
    most = c.steps * c.prompts_per_step
    training, dropped = fitting(training, most, policy, c, method.needs_rejected)
    held_out, more = fitting(held_out, c.eval_prompts, policy, c, False)
    if dropped + more:
        print(
            f"left out {dropped + more} records longer than --max-prompt-tokens or --max-expert-tokens",
            file=sys.stderr,
        )
    check_unknown(training + held_out, policy, c)
    return training, held_out


def fitting(records, most, policy, c, with_rejected):
    """The first `most` records that are short enough, with their ids, and how many were passed over."""
    kept, dropped = [], 0
    for record in records:
        if len(kept) == most:
            break
        encoded = encode(record, policy, c, with_rejected)
        if encoded is None:
            dropped += 1
        else:
            kept.append(encoded | {"record_index": len(kept)})
    if not kept:
        raise UserError(
            f"data {c.data}: no record is short enough for --max-prompt-tokens and --max-expert-tokens"
        )
    return kept, dropped


def encode(record, policy, c, with_rejected):
    """A record with its token ids; None if it is longer than the flags allow. UserError if it passes the
    model's context.
    """
    ids = policy.encode_prompt(record["prompt"])
    answers = {"expert_ids": policy.encode_answer(record["chosen"])}
    if with_rejected:
        answers["rejected_ids"] = policy.encode_answer(record["rejected"])
    longest = max(map(len, answers.values()))
    if 0 < c.max_prompt_tokens < len(ids) or 0 < c.max_expert_tokens < longest:
        return None
    if len(ids) + max(longest, c.max_new_tokens) > policy.context:
        raise UserError(f"data {c.data}: {too_long(record, len(ids), longest, c, policy.context)}")
    return record | {"prompt_ids": ids, **answers}


def too_long(record, prompt, answer, c, context):
    """What does not fit into the context, in tokens, and which flag helps: it may be the record or the
    samples.
    """
    said = f"the prompt {str(record['prompt'])[:60]!r} has {prompt} tokens and its answer {answer}; "
    if prompt + answer <= context and c.max_new_tokens > answer:
        said += f"with --max-new-tokens {c.max_new_tokens} that passes the model's context of {context}: "
        return said + f"set it to at most {context - prompt} for this prompt"
    said += f"with {c.max_new_tokens} new tokens that passes the model's context of {context}: "
    return said + "set --max-prompt-tokens and --max-expert-tokens to leave such records out"


def check_unknown(records, policy, c):
    """UserError where the model's vocabulary hardly covers the prompts: it would train on <unk>."""
    unk = policy.tokenizer.unk_token_id
    tokens = sum(len(r["prompt_ids"]) for r in records)
    unknown = sum(r["prompt_ids"].count(unk) for r in records)
    if unk is not None and unknown > 0.1 * tokens:
        raise UserError(
            f"data {c.data}: {unknown / tokens:.0%} of its tokens are unknown to model {c.model}; "
            "choose another --model"
        )
