"""Expert answers from a larger model: it answers the prompts, the verifier decides what is kept (rejection sampling).

    python -m data.teach --model DIR-OR-HUB-NAME --out teacher.jsonl --prompts 1000 --samples 8
    python uniapl.py --data teacher.jsonl

Every prompt with an answer that passes becomes a record of --out: `chosen` is the first such answer, `experts` holds
the different others, and the columns that the verifier reads stay. `rejected` goes: it belonged to another answer.

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "chosen": "bees live in hives.", "experts": ["a bee makes honey."], "constraints": [{"type": "lowercase"}], ...}

data/ knows neither models nor rewards; this script stands on top of both and imports them where it runs.
"""

import argparse
import sys

from data.errors import UserError
from data.loaders import load_records


def teach(policy, records, samples, max_new_tokens, temperature=1.0, seed=0, at_once=16):
    """Sample answers of a policy.Policy, keep what passes the verifier -> (records as above, counts as {name: int})."""
    from reward import checked_rewards, verifier

    kept, counts = [], dict.fromkeys(("prompts", "samples", "cut", "passed", "distinct", "kept"), 0)
    for begin in range(0, len(records), at_once):
        part = records[begin : begin + at_once]
        rollout = policy.generate(
            [policy.encode_prompt(r["prompt"]) for r in part],
            samples,
            max_new_tokens,
            temperature,
            seed + begin,
        )
        for record, group, cut in zip(part, rollout.completions, rollout.truncated):
            texts = [policy.decode(ids) for ids in group]
            columns = {k: [v] * samples for k, v in record.items() if k != "prompt"}
            rewards = checked_rewards(
                verifier, [record["prompt"]] * samples, texts, columns | {"truncated": cut}
            )
            passed = [
                text
                for text, reward, is_cut in zip(texts, rewards, cut)
                if reward >= 1 and text.strip() and not is_cut
            ]
            distinct = list(dict.fromkeys(passed))
            for name, more in (
                ("prompts", 1),
                ("samples", samples),
                ("cut", sum(cut)),
                ("passed", len(passed)),
                ("distinct", len(distinct)),
                ("kept", bool(distinct)),
            ):
                counts[name] += more
            if distinct:
                rest = {
                    k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", "experts")
                }
                kept.append(
                    {"prompt": record["prompt"], "chosen": distinct[0], "experts": distinct[1:], **rest}
                )
    return kept, counts


def main(argv=None):
    """The command line -> exit status."""
    from engine.command_line import exit_status

    return exit_status(lambda: write_taught(read_flags(argv)))


def read_flags(argv):
    from engine.command_line import OneLineParser

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="the teacher: a hub name, a directory, a .gguf file, or tiny"
    )
    parser.add_argument("--adapter", help="a LoRA adapter of it, such as runs/NAME/adapter")
    parser.add_argument(
        "--quantize", choices=("nf4", "none"), default="none", help="nf4: 4-bit weights [none]"
    )
    parser.add_argument(
        "--data", default="tasks", help="tasks (built in) or FILE.jsonl with 'constraints' [tasks]"
    )
    parser.add_argument(
        "--level", choices=("tiny", "chat"), help="of the tasks [tiny for --model tiny, else chat]"
    )
    parser.add_argument("--out", required=True, help="JSONL file to write; must not exist")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of the training split [1000]")
    parser.add_argument("--samples", type=int, default=8, help="answers to each [8]")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, tokens [128]")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature [1.0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    args = parser.parse_args(argv)
    for flag in ("prompts", "samples", "max_new_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 1 or more")
    if not 0 < args.temperature <= 10:
        raise UserError(f"--temperature {args.temperature}: must be above 0 and at most 10")
    return args


def write_taught(args):
    from engine.folders import reserve, to_json, write_whole

    with reserve(args.out, "file of answers") as out:
        kept = ask_teacher(args)
        write_whole(out, "".join(to_json(record) + "\n" for record in kept))
    print(f"They are in {args.out}: python uniapl.py --data {args.out}")
    return kept


def ask_teacher(args):
    """The records to write; UserError if there are none."""
    from policy import Policy

    level = args.level or ("tiny" if args.model == "tiny" else "chat")
    records = load_records(args.data, "train", args.prompts, seed=args.seed, level=level)
    if not all("constraints" in r for r in records):
        raise UserError(f"data {args.data}: has no 'constraints' for the verifier to check")
    policy = Policy.load(
        args.model,
        quantize=args.quantize,
        adapter=args.adapter,
        reference="base",
        device=args.device,
        seed=args.seed,
    )
    kept, counts = teach(policy, records, args.samples, args.max_new_tokens, args.temperature, args.seed)
    print(
        f"{counts['samples']} answers to {counts['prompts']} prompts: {counts['cut']} cut at the length limit, "
        f"{counts['passed']} passed the verifier, {counts['distinct']} of them different; "
        f"{counts['kept']} prompts kept"
    )
    if not kept:
        raise UserError(
            f"no answer of {args.model} passed, so there is nothing to write; take a larger model, or "
            "more --samples"
        )
    return kept


if __name__ == "__main__":
    sys.exit(main())
