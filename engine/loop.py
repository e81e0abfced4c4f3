"""The loop of a run around a method's step: its folder, its progress, what is written at its end.

A trainer is a train.Trainer; a folder a record.RunFolder.
"""

import time

from tqdm import tqdm

from data import UserError
from engine.draw import draw_curves
from engine.evaluation import evaluate, evaluation
from engine.folders import read_jsonl, write_whole
from engine.models import trim_memory
from engine.record import peak_memory
from engine.report import report
from engine.settings import check_settings

# Panels of curves.png that every method has: (title, y label, metrics).
PANELS = [
    ("Reward", "reward", ["reward/mean", "reward/expert", "eval/reward"]),
    ("KL to the reference", "nats/token", ["kl/k1", "kl/k3"]),
    ("Entropy", "nats/token", ["entropy"]),
    ("Length of samples", "tokens", ["length/min", "length/mean", "length/max"]),
    ("Shares", "share", ["length/truncated", "groups/no_signal"]),
]


def resumed_config(method, given, folder):
    """The settings of the run in `folder`. UserError if it is finished, or a flag asks for other settings."""
    if given.get("overwrite"):
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    config = method.config(**folder.settings(method) | {"resume": True})
    wanted = check_settings(method.config(**given))
    for name in given:
        saved = getattr(config, name)
        if name not in ("resume", "out", "device") and getattr(wanted, name) != saved:
            raise UserError(
                f"--resume: {name} was {saved} in {folder.path}; leave the flag out, or start a new run"
            )
    if folder.report.is_file():
        raise UserError(
            f"--resume: {folder.path} has finished its {config.steps} steps; go on from it with "
            f"--from-adapter {folder.adapter}"
        )
    config.device = given.get("device", config.device)
    return config


def headline(trainer):
    """What is trained, on what, with how much of it."""
    c, policy = trainer.config, trainer.policy
    kind = "nf4" if c.quantize == "nf4" else str(policy.dtype).removeprefix("torch.")
    count = sum(p.numel() for p in trainer.params.values() if p.requires_grad)
    return (
        f"{trainer.method.name} · {c.model} · {kind} on {policy.device} · LoRA rank {c.lora_rank}, "
        f"{count / 1e6:.2f} M trained · {len(trainer.records)} training and {len(trainer.held_out)} "
        "held-out prompts"
    )


def take_steps(trainer, folder, stop):
    """Steps until the last one, or until `stop` is asked for -> the last evaluation, None without one."""
    steps, every, after = trainer.config.steps, trainer.config.eval_every, None
    bar = tqdm(total=steps, initial=trainer.step, desc=trainer.method.name, unit="step", dynamic_ncols=True)
    with bar:  # closed before an error is reported
        while trainer.step < steps and not stop.asked:
            metrics = take_step(trainer)
            due = trainer.step % every == 0 or trainer.step == steps
            if due:
                after = evaluate(trainer)
                metrics |= evaluation(after)
            trim_memory(trainer.step)
            folder.log({"step": trainer.step} | metrics)
            bar.set_postfix_str(postfix(metrics))
            bar.update()
            if due or stop.asked:
                folder.save(trainer)
                draw(trainer.method, folder)
    return after


def take_step(trainer):
    """One optimisation step on the run's next prompts -> its metrics."""
    start = time.perf_counter()
    metrics = trainer.method.update(trainer, trainer.next_records())
    trainer.step += 1
    metrics["time/update"] = time.perf_counter() - start - metrics.get("time/rollout", 0.0)
    metrics["memory/peak"] = peak_memory()
    return metrics


def draw(method, folder):
    lines = [{k: v for k, v in line.items() if v is not None} for line in read_jsonl(folder.metrics)]
    draw_curves(lines, PANELS + method.panels, folder.curves)


def finish(trainer, folder, before, after):
    """What a finished run has and an interrupted one lacks; report.txt, written last, is the sign."""
    if after is None:  # killed after its last checkpoint: nothing was left to train
        after = evaluate(trainer)
        draw(trainer.method, folder)
    after = [new | floor_of(old) for old, new in zip(before, after)]
    folder.write_samples(before + after)
    text = report(before, after)
    write_whole(folder.report, text + "\n")
    print("\n" + text)
    print(
        f"The run is in {folder.path}: curves.png, metrics.jsonl, samples.jsonl, report.txt, adapter/ (loads "
        "with peft.PeftModel.from_pretrained)."
    )
    print(f"To try next: {trainer.method.next}; or go on from here: --from-adapter {folder.adapter}")


def floor_of(sample):
    return {name: sample[name] for name in ("floor", "floor_reward") if name in sample}


def postfix(metrics):
    names = {
        "reward/mean": "reward",
        "reward/expert": "expert",
        "kl/k1": "kl",
        "entropy": "ent",
        "length/mean": "len",
        "loss": "loss",
    }
    return " ".join(f"{short} {metrics[name]:.3g}" for name, short in names.items() if name in metrics)
