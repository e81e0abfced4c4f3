"""GRAO and UniAPL on TRL against minigrao.update and uniapl.update: same samples, loss, gradient."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from conftest import ROOT, randomise
from peft import PeftModel

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import minigrao
import scale
import uniapl
from baselines import grpo_advantages
from data import UserError
from engine.models import TINY
from engine.settings import check_settings
from losses import aggregate_tokens, normaliser
from policy import Policy
from reward import verifier
from train import Trainer

B, G, TOKENS = 4, 4, 16
TINY_RUN = dict(
    model="tiny", quantize="none", device="cpu", dtype="float32", prompts_per_step=B, group_size=G, seed=3,
    max_new_tokens=TOKENS, lora_rank=4, lora_alpha=8, steps=4, eval_prompts=2,
)  # fmt: skip


def likeness(prompts, completions, **columns):
    """A discriminator that any answer's text decides."""
    texts = [c if isinstance(c, str) else c[-1]["content"].strip() for c in completions]
    return [float(len(text) % 7) for text in texts]


# ------------------------------------------------------------------------------------------------------------
# A step of the project's own, and the same step on TRL


@dataclass
class Step:
    """What a step of minigrao.update or uniapl.update drew and found."""

    adapter: str
    records: list
    samples: dict  # prompt's ids -> its G samples
    batch: object
    experts: list  # ids of each y
    expert_rewards: torch.Tensor  # (B,)
    loss: float
    gradient: dict
    policy: object


def project_step(method, folder, **settings):
    """One update of the project's own; the optimiser does not move, so that the gradient can be read."""
    trainer = Trainer(method, check_settings(method.config(**TINY_RUN | settings)))
    randomise(trainer.policy)
    trainer.policy.save(folder / "adapter")
    records, seen, rollout = trainer.next_records(), {}, trainer.rollout

    def watched(records):
        seen["batch"] = rollout(records)
        return seen["batch"]

    def read():
        seen["gradient"] = {
            n: p.grad.clone() for n, p in trainer.policy.trainable().items() if p.grad is not None
        }
        return {"grad_norm": 0.0, "lr": 0.0}

    trainer.rollout, trainer.optimizer_step = watched, read
    loss = method.update(trainer, records)["loss"]
    batch = seen["batch"]
    samples = {tuple(q): group for q, group in zip(batch.prompts, batch.completions)}
    answers = [r["chosen"] for r in records]
    experts = [trainer.policy.encode_answer(y) for y in answers]
    expert_rewards = torch.tensor(trainer.rewards(records, answers, [False] * B))
    return Step(
        str(folder / "adapter"),
        records,
        samples,
        batch,
        experts,
        expert_rewards,
        loss,
        seen["gradient"],
        trainer.policy,
    )


class Grab(transformers.TrainerCallback):
    """Keeps the gradient of the last step and everything that was logged."""

    def __init__(self):
        self.gradient, self.logs = {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        parameters = (model.module if hasattr(model, "module") else model).named_parameters()
        self.gradient = {n: p.grad.detach().clone() for n, p in parameters if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **rest):
        self.logs.append(dict(logs))

    def values(self, name):
        return [line[name] for line in self.logs if name in line]


def forced(trainer_class, samples):
    """The trainer, made to draw given samples of each prompt: the one at a row's place in its group."""

    class Forced(trainer_class):
        def _generate_single_turn(self, prompt_ids, *rest, **more):
            begin = self.accelerator.process_index * len(prompt_ids)
            drawn = [
                samples(tuple(q), (begin + i) % G, self.state.global_step) for i, q in enumerate(prompt_ids)
            ]
            return drawn, None

    return Forced


def load(adapter, **options):
    base = transformers.AutoModelForCausalLM.from_pretrained(str(TINY), **dict(dtype=torch.float32) | options)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def config(config_class, folder, rows=(B * G, 1), **settings):
    """rows: samples in a micro-batch, micro-batches in a step."""
    size, pieces = rows
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=pieces,
        num_generations=G, max_completion_length=TOKENS, max_steps=1, learning_rate=1e-9, max_grad_norm=0.0,
        shuffle_dataset=False, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return config_class(**defaults | settings)


def trl_trainer(trainer_class, adapter, records, rewards, args, **options):
    clean = [{k: v for k, v in r.items() if not k.endswith(("_ids", "_index"))} for r in records]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(TINY))
    model = adapter if isinstance(adapter, PeftModel) else load(adapter)
    options = dict(processing_class=tokenizer, callbacks=[Grab()]) | options
    return trainer_class(model, rewards, args, scale.dataset(clean), **options)


def trl_step(step, trainer_class, rewards, args):
    trainer = trl_trainer(
        forced(trainer_class, lambda q, i, _: step.samples[q][i]), step.adapter, step.records, rewards, args
    )
    trainer.train()
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Grab))


def assert_same(gradient, expected, tolerance=1e-5):
    """Every tensor to `tolerance` of the whole gradient's norm."""
    assert set(gradient) == set(expected)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > 0
    for name, g in expected.items():
        assert (gradient[name] - g).norm() <= tolerance * norm, name


# ------------------------------------------------------------------------------------------------------------
# Equal to minigrao.update


@pytest.mark.parametrize("group", ("samples", "with_reference"))
@pytest.mark.parametrize("without", (None, "imitation", "exploration", "regularizer"))
def test_grao_is_minigrao(group, without, tmp_path):
    step = project_step(minigrao.GRAO, tmp_path, group=group, without=without)
    grab = trl_step(
        step, scale.GRAOTrainer, verifier, config(scale.GRAOConfig, tmp_path, group=group, without=without)
    )
    assert abs(grab.values("loss")[0] - step.loss) < 1e-5
    assert_same(grab.gradient, step.gradient)


@pytest.mark.parametrize("rows", ((4, 4), (2, 8), (1, 16)))
def test_the_cut_into_micro_batches_does_not_matter(rows, tmp_path):
    """2 rows and 1 tear every group; all 20 do not divide by 8 or 16 micro-batches, so empty ones fill up."""
    step = project_step(minigrao.GRAO, tmp_path)
    grab = trl_step(step, scale.GRAOTrainer, verifier, config(scale.GRAOConfig, tmp_path, rows))
    assert abs(grab.values("loss")[0] - step.loss) < 1e-5
    assert_same(grab.gradient, step.gradient)


# ------------------------------------------------------------------------------------------------------------
# Equal to uniapl.update

VARIANTS = {
    "unified": dict(mu=0.4),
    "unified, by its schedule": dict(mu_peak=0.7),
    "token means": dict(mu=0.4, aggregate="token"),
    "a-sft": dict(variant="a-sft", lambda_adv=0.3),
    "a-grpo": dict(variant="a-grpo", lambda_adv=0.3),
    "chord": dict(variant="chord"),
    "phi": dict(variant="chord", phi=True, mu=0.5),
    "luffy": dict(variant="luffy"),
    "luffy, token means": dict(variant="luffy", aggregate="token"),
    "hpt": dict(variant="hpt"),
}


def value_of_logs(step, variant, mu, aggregate):
    """What A log pi makes of the loss where uniapl.py has A pi/pi: the same gradient, another value."""
    batch = step.batch
    with torch.no_grad():
        scored = step.policy.token_logps(batch.prompts, batch.completions)
    logps, mask = scored.logps.flatten(0, 1), scored.mask.flatten(0, 1)
    A, n = grpo_advantages(batch.rewards), normaliser(mask, aggregate)
    if variant == "luffy":  # the expert is one of the group, and of its count
        members = torch.cat([batch.rewards, step.expert_rewards[:, None]], 1)
        A = grpo_advantages(members)[:, :G]
        n = n + (B if aggregate == "sequence" else sum(map(len, step.experts)))
    if variant == "hpt":
        fails = uniapl.hpt_switch(batch.rewards)
        assert 0 < fails.sum() < B
        A = torch.where(fails[:, None], 0.0, A)
    return float(
        (1 - mu) * aggregate_tokens(A.flatten()[:, None] * (1 - logps), mask, aggregate, denominator=n)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_uniapl_is_uniapl(name, tmp_path, monkeypatch):
    """The discriminator is a number of each text, so that both sides have the same scores."""
    settings = VARIANTS[name]
    variant = settings.get("variant", "unified")

    def judge(trainer, kind, batch):
        texts = [[trainer.policy.decode(ids) for ids in group] for group in batch.completions]
        return torch.tensor([likeness(None, group) for group in texts]), {}

    monkeypatch.setattr(uniapl.discriminator, "judge", judge)
    anchored = variant in ("unified", "a-sft", "a-grpo")
    more = dict(discriminator="embedding") if anchored else {}
    step = project_step(uniapl.UNIAPL, tmp_path, **settings, **more)
    rewards = [verifier, likeness] if anchored else [verifier]
    args = config(scale.UniAPLConfig, tmp_path, (4, 4), **settings)
    grab = trl_step(step, scale.UniAPLTrainer, rewards, args)
    assert_same(grab.gradient, step.gradient)
    mu = grab.values("mu")[0] if variant in ("unified", "chord") else float(variant == "a-sft")
    expected = step.loss + value_of_logs(step, variant, mu, settings.get("aggregate", "sequence"))
    assert abs(grab.values("loss")[0] - expected) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# Rows, ratios, rewards


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A step of minigrao.update, made once, for tests that only need samples and an adapter."""
    return project_step(minigrao.GRAO, tmp_path_factory.mktemp("step"))


def rollout(step, rewards, args, records=None, trainer_class=scale.GRAOTrainer, **options):
    """A trainer and the rows of its first rollout."""
    given = forced(trainer_class, lambda q, i, _: step.samples[q][i])
    trainer = trl_trainer(given, step.adapter, records or step.records, rewards, args, **options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    rows = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    return trainer, rows


def row_ids(rows, name):
    ids, mask = rows[f"{name}_ids"], rows[f"{name}_mask"].bool()
    return [row[m].tolist() for row, m in zip(ids, mask)]


def gradient(trainer, rows):
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    loss = trainer.compute_loss(trainer.model, rows)
    found = torch.autograd.grad(loss, parameters)
    return loss.detach(), torch.cat([g.flatten() for g in found])


def test_off_policy_samples_count_by_a_clipped_ratio_and_y_does_not(step, tmp_path):
    """By hand: pi / pi_old of 3 counts as 1.2, one of 1/2 as it is; vLLM's 0.7 on top. y never has one."""
    trainer, rows = rollout(step, verifier, config(scale.GRAOConfig, tmp_path))
    n, T = B * G, rows["completion_ids"].shape[1]
    ids, attention = (torch.cat([rows[f"prompt_{x}"], rows[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, T)[0]
    ratio = torch.full((len(ids), 1), 3.0)
    ratio[::2] = 0.5
    off = rows | {
        "old_per_token_logps": logps - ratio.log(),
        "importance_sampling_ratio": torch.full_like(logps, 0.7),
    }
    by_hand = rows | {"weight": rows["weight"].clone()}
    by_hand["weight"][:n] *= 0.7 * torch.where(torch.arange(n) % 2 == 0, 0.5, 1.2)
    found, expected = gradient(trainer, off), gradient(trainer, by_hand)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert rows["weight"][n:].abs().max() > 0

    experts = {"weight": torch.where(rows["sampled"], 0.0, rows["weight"])}
    for a, b in zip(gradient(trainer, off | experts), gradient(trainer, rows | experts)):
        assert torch.equal(a, b)


def test_two_iterations_share_one_rollout(step, tmp_path):
    """num_iterations = 2: the second step learns from the first one's samples, whose ratio is no longer 1."""
    seen = []

    class Watched(scale.GRAOTrainer):
        def compute_loss(self, model, inputs, *rest, **more):
            ratio = self.ratio_of_rows(model, inputs)
            seen.append((inputs["completion_ids"].sum().item(), ratio))
            return super().compute_loss(model, inputs, *rest, **more)

        def ratio_of_rows(self, model, inputs):
            ids, attention = (
                torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
            )
            with torch.no_grad():
                logps = self._get_per_token_logps_and_entropies(
                    model, ids, attention, inputs["completion_ids"].shape[1]
                )[0]
            return self.ratio(logps, inputs)[inputs["sampled"]][
                inputs["completion_mask"][inputs["sampled"]].bool()
            ]

    args = config(scale.GRAOConfig, tmp_path, num_iterations=2, max_steps=2, learning_rate=1e-2)
    given = forced(Watched, lambda q, i, _: step.samples[q][i])
    trl_trainer(given, step.adapter, step.records, verifier, args).train()
    (ids, first), (again, second) = seen
    assert ids == again
    torch.testing.assert_close(first, torch.ones_like(first), rtol=1e-4, atol=1e-4)
    assert (second - 1).abs().max() > 1e-2 and second.max() <= 1.2 + 1e-6


@pytest.mark.parametrize("plain", (False, True))
def test_prompts_are_messages_or_texts(step, tmp_path, plain, monkeypatch):
    """A text goes to the model as it is, messages by the chat template; y is the same row in both."""
    seen, records, n = [], [dict(r) for r in step.records], B * G
    if not plain:
        for r in records:
            r["chosen"] = [{"role": "assistant", "content": r["chosen"]}]

    records[-1]["hint"] = "only here"  # the other records lack this column, and a reward function gets None

    def reward(prompts, completions, truncated, hint, **columns):
        assert hint == [None] * (n - G) + ["only here"] * G + [None] * (B - 1) + ["only here"]
        seen.extend(zip(prompts, completions, truncated))
        return likeness(prompts, completions)

    if plain:
        monkeypatch.setattr(scale, "messages", lambda prompt: prompt)
    encode = step.policy.tokenizer.encode if plain else step.policy.encode_prompt
    samples = {tuple(encode(r["prompt"])): list(step.samples[tuple(r["prompt_ids"])]) for r in records}
    for group in samples.values():
        group[0] = group[0][:-1]  # cut, before its EOS
    step = replace(step, records=records, samples=samples)
    trainer, rows = rollout(step, reward, config(scale.GRAOConfig, tmp_path, max_completion_length=2))
    assert row_ids(rows, "prompt")[n:] == [encode(r["prompt"]) for r in records]
    assert row_ids(rows, "completion")[n:] == step.experts  # whole, though longer than 2 tokens
    assert all(len(y) > 2 for y in step.experts)
    assert isinstance(seen[0][0], str) == isinstance(seen[0][1], str) == plain
    answers = [step.policy.decode(ids) for ids in step.experts]
    assert [c if plain else c[-1]["content"] for _, c, _ in seen[n:]] == answers
    assert [cut for _, _, cut in seen] == [True, False, False, False] * B + [False] * B


def test_a_group_that_nobody_scored_counts_as_tied(step, tmp_path):
    """None for one sample: eq. (4) has no scale there. 0 for it, as TRL has it, would be a bad mark."""
    seen = []

    def reward(prompts, completions, **columns):
        scores = likeness(prompts, completions)
        seen.append(len(scores))
        return [None, *scores[1:]]

    trainer, rows = rollout(step, reward, config(scale.GRAOConfig, tmp_path))
    w = torch.cat([rows["weight"][: B * G].view(B, G), rows["weight"][B * G :, None]], 1)
    assert seen == [B * (G + 1)] and w[0].eq(0).all() and w[1:].abs().sum() > 0
    assert torch.isfinite(gradient(trainer, rows)[0])


# ------------------------------------------------------------------------------------------------------------
# Processes, checkpoints, adapters


def drawn(q, place, step):
    """Samples that prompt, place in the group and step decide, whoever draws them."""
    generator = torch.Generator().manual_seed(hash((q, place, step)) % 2**31)
    length = 2 + int(torch.randint(TOKENS - 2, (), generator=generator))
    return torch.randint(4, 170, (length,), generator=generator).tolist()


def five_steps(adapter, folder, rows):
    """-> (losses, gradient norms, the adapter's values) of five steps with three prompts each."""
    records = scale.load_records("tasks", "train", 15, seed=0, level="tiny")
    args = config(scale.GRAOConfig, folder, rows, max_steps=5, learning_rate=1e-3, max_grad_norm=1.0)
    trainer = trl_trainer(forced(scale.GRAOTrainer, drawn), adapter, records, likeness, args)
    trainer.train()
    grab = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Grab))
    model = trainer.accelerator.unwrap_model(trainer.model)
    values = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return torch.tensor(grab.values("loss")), torch.tensor(grab.values("grad_norm")), values


def test_two_processes_are_one(step, tmp_path):
    """Twelve rows on two ranks are six and six, so the second group of four lies on both."""
    alone = five_steps(step.adapter, tmp_path / "one", (4, 3))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
    ]
    subprocess.run([*command, step.adapter, str(tmp_path / "two")], check=True, cwd=ROOT)
    both = torch.load(tmp_path / "two.pt")
    for a, b in zip(alone, both):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert len(alone[0]) == 5 and alone[0].std() > 1e-3


def test_resumed_is_never_stopped(step, tmp_path):
    """Two steps, a checkpoint, two more: the adapter of four; the model draws, with an evaluation between."""
    values = []
    for name, resume in (("whole", None), ("stopped", None), ("stopped", True)):
        args = config(
            scale.GRAOConfig, tmp_path / name, max_steps=2 if (name, resume) == ("stopped", None) else 4,
            learning_rate=1e-2, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            per_device_eval_batch_size=B * G, lr_scheduler_type="constant",
        )  # fmt: skip
        records = scale.load_records("tasks", "train", 16, seed=0, level="tiny")
        held_out = scale.dataset(records[:B])
        trainer = trl_trainer(scale.GRAOTrainer, step.adapter, records, likeness, args, eval_dataset=held_out)
        trainer.train(resume_from_checkpoint=resume)
        values.append(
            torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        )
    grab = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Grab))
    assert grab.values("eval_reward/expert") and torch.isfinite(torch.tensor(grab.values("eval_loss"))).all()
    assert not torch.allclose(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_the_script_trains_and_its_adapter_loads_here(tmp_path, capsys):
    """The way back, from policy.save to TRL, is that of every test above."""
    settings = f"""
model_name_or_path: tiny
dtype: float32
bf16: false
use_cpu: true
use_peft: true
lora_r: 4
num_generations: 4
per_device_train_batch_size: 8
max_completion_length: 8
max_steps: 1
learning_rate: 1.0e-2
gradient_checkpointing: false
records: 4
save_strategy: "no"
report_to: none
output_dir: {tmp_path / "out"}
"""
    (tmp_path / "run.yaml").write_text(settings)
    assert scale.run(["grao", "--config", str(tmp_path / "run.yaml"), "--imitation", "0.7"])
    policy = Policy.load("tiny", adapter=str(tmp_path / "out"), device="cpu", dtype="float32")
    prompt, y = policy.encode_prompt("list 3 animals"), policy.encode_answer("cat dog fox")
    model = load(str(tmp_path / "out")).eval()
    with torch.no_grad():
        ours = policy.token_logps([prompt], [[y]]).logps[0, 0]
        logits = model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(ours, logits.log_softmax(-1).gather(-1, torch.tensor(y)[:, None])[:, 0])
    assert any(p.abs().sum() > 0 for n, p in policy.trainable().items() if "lora_B" in n)


def test_nf4(tmp_path):
    """TRL rounds QLoRA's adapters to bf16. Here they are what they were, and so is the gradient."""
    step = project_step(minigrao.GRAO, tmp_path, quantize="nf4")
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = load(step.adapter, quantization_config=nf4)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    given = forced(scale.GRAOTrainer, lambda q, i, _: step.samples[q][i])
    trainer = trl_trainer(given, model, step.records, verifier, config(scale.GRAOConfig, tmp_path))
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, before[name])
    trainer.train()
    grab = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Grab))
    assert_same(grab.gradient, step.gradient)


def test_a_discriminator_from_its_directory(step, tmp_path):
    """The scores of uniapl.py's own, from the samples' ids."""
    argv = (
        "--model tiny --quantize none --device cpu --pairs 16 --test-pairs 2 --epochs 1 --lora-rank 4".split()
    )
    uniapl.discriminator.train_command([*argv, "--out", str(tmp_path / "D")])
    D = scale.Discriminator(str(tmp_path / "D"))
    ids = [group[0] for group in step.batch.completions]
    prompts, chosen = [r["prompt"] for r in step.records], [r["chosen"] for r in step.records]
    found = D(prompts, None, ids, chosen=chosen)
    expected = uniapl.discriminator.scores(
        "polar", D.policy, step.batch.prompts, step.experts, [[i] for i in ids]
    )
    assert found == [row[0] for row in expected] and len(set(found)) > 1


# ------------------------------------------------------------------------------------------------------------
# Refusals, one line each

BAD_SETTINGS = {
    "TRL's KL": (scale.GRAOConfig, dict(beta=0.1), "beta: a setting of TRL's losses"),
    "TRL's loss": (scale.GRAOConfig, dict(loss_type="dr_grpo"), "loss_type: "),
    "no whole group": (scale.GRAOConfig, dict(per_device_train_batch_size=6), "batch_size 4, 8, 12... or"),
    "nor in evaluation": (
        scale.GRAOConfig, dict(eval_strategy="steps", per_device_eval_batch_size=6), "generations 2, 3, 6",
    ),
    "a range": (scale.GRAOConfig, dict(lam=-1.0), "--lam -1.0: must be at least 0"),
    "no such group": (scale.GRAOConfig, dict(group="all"), "choose one of samples, with_reference"),
    "a temperature": (scale.UniAPLConfig, dict(temperature=0.7), "imitation is scored at 1"),
    "mu beside a-sft": (scale.UniAPLConfig, dict(variant="a-sft", mu=0.5), "not for a-sft"),
    "stages": (scale.UniAPLConfig, dict(variant="sft-grpo"), "variant sft-grpo: one of unified"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_work(name, tmp_path):
    config_class, settings, message = BAD_SETTINGS[name]
    with pytest.raises(UserError, match=message) as error:
        config(config_class, tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_what_the_trainer_refuses(step, tmp_path):
    cases = [
        (scale.GRAOTrainer, scale.GRAOConfig, step.records, dict(tools=[print]), "tools: "),
        (
            scale.UniAPLTrainer,
            scale.UniAPLConfig,
            step.records,
            {},
            "reward_funcs is .reward, discriminator.",
        ),
    ]
    for trainer_class, config_class, records, options, message in cases:
        with pytest.raises(UserError, match=message):
            trl_trainer(
                trainer_class, step.adapter, records, verifier, config(config_class, tmp_path), **options
            )
    nameless = scale.dataset(step.records).remove_columns("chosen")
    with pytest.raises(UserError, match="no column `chosen`"):
        scale.GRAOTrainer(load(step.adapter), verifier, config(scale.GRAOConfig, tmp_path), nameless)


def test_another_trl_is_refused_by_name(monkeypatch):
    scale.check_trl()
    with monkeypatch.context() as patch:
        patch.setattr(scale.trl, "__version__", "1.17.0")
        with pytest.raises(
            UserError, match="TRL 1.17.0 was not tested; scale.py is tested with 1.12 and 1.16"
        ):
            scale.check_trl()
    monkeypatch.setattr(scale.GRPOTrainer, "compute_loss", lambda self, model, batch: None)
    with pytest.raises(UserError, match="has other arguments for compute_loss"):
        scale.check_trl()


def test_without_trl_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "trl.py").write_text("raise ImportError('No module named trl')")
    done = subprocess.run(
        [sys.executable, "scale.py", "grao"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: scale.py needs TRL") and "requirements-scale.txt" in done.stderr


if __name__ == "__main__":  # one of the ranks of test_two_processes_are_one
    adapter, out = sys.argv[1:]
    found = five_steps(adapter, out, (2, 3))
    if os.environ["RANK"] == "0":
        torch.save(found, out + ".pt")
    torch.distributed.destroy_process_group()
