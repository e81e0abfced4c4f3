"""Loading, roles, text, saving and merging; and what is said to a user whose files or flags are wrong."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from conftest import END_OF_TURN, WORDS, dense_logps, random_ids, randomise_all, reload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from data import UserError
from engine.sampling import merged_weight
from policy import HEAD, Policy

PROMPTS = random_ids((5, 2), seed=1)
COMPLETIONS = [random_ids((4, 1, 7), seed=2), random_ids((3, 6, 2), seed=3)]


def score(policy, role="policy"):
    with torch.no_grad():
        return policy.token_logps(PROMPTS, COMPLETIONS, 0.7, role=role).logps


@pytest.fixture(scope="module")
def adapter(shared, tmp_path_factory):
    """A saved adapter that is not the identity."""
    shared().save(tmp_path_factory.mktemp("saved") / "adapter")
    return tmp_path_factory.getbasetemp() / "saved0" / "adapter"


# ------------------------------------------------------------------------------------------------------------
# Roles


@pytest.mark.parametrize("family, quantize", (("qwen3", "none"), ("qwen3", "nf4"), ("phi", "none")))
def test_kl_is_exactly_0_at_the_first_step(load, family, quantize):
    policy = load(family, fresh=True, quantize=quantize)
    assert torch.equal(score(policy), score(policy, "reference"))


@pytest.mark.parametrize("quantize", ("none", "nf4"))
def test_kl_is_exactly_0_when_training_starts_from_an_adapter(load, adapter, quantize):
    """With "adapter off" as the reference, training was pulled back to the base from its first step on."""
    policy = load(fresh=True, adapter=adapter, quantize=quantize)
    reference = score(policy, "reference")
    assert torch.equal(score(policy), reference)
    base = load(fresh=True, adapter=adapter, reference="base", quantize=quantize)
    assert torch.equal(score(base), reference)
    assert (score(base, "reference") - reference).abs().max() > 0.1
    assert torch.equal(score(base, "reference"), score(load(fresh=True, quantize=quantize)))
    for p in policy.trainable().values():
        p.data += 0.1
    assert torch.equal(score(policy, "reference"), reference) and not torch.equal(score(policy), reference)


def test_only_the_policy_adapter_learns(load, adapter):
    policy = load(fresh=True, adapter=adapter)
    assert {id(p) for p in policy.hf.parameters() if p.requires_grad} == {
        id(p) for p in policy.trainable().values()
    }
    policy.token_logps(PROMPTS, COMPLETIONS).logps.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in policy.trainable().values())
    assert not policy.token_logps(PROMPTS, COMPLETIONS, role="reference").logps.requires_grad


@pytest.mark.parametrize("start", ("fresh", "adapter"))
def test_an_exception_leaves_no_role_behind(load, adapter, start):
    """A training step that failed inside the reference's block went on training with the adapter off."""
    policy = load(fresh=True, adapter=adapter if start == "adapter" else None)
    before, grads = score(policy), [p.requires_grad for p in policy.hf.parameters()]
    with pytest.raises(ZeroDivisionError), policy.role("reference"):
        with pytest.raises(KeyError), policy.role("policy"):
            raise KeyError
        raise ZeroDivisionError
    assert torch.equal(score(policy), before)
    assert [p.requires_grad for p in policy.hf.parameters()] == grads
    with pytest.raises(KeyError):
        policy.token_logps(PROMPTS, COMPLETIONS, role="judge")


def edited(adapter, directory, **changes):
    shutil.copytree(adapter, directory)
    config = json.loads((directory / "adapter_config.json").read_text()) | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_lora_dropout_leaves_the_ratio_at_1(load, adapter, tmp_path):
    """An adapter trained elsewhere brings its dropout along; ratios then scatter around 1 before the first
    update.
    """
    dropped = edited(adapter, tmp_path / "dropped", lora_dropout=0.5)
    policy = load(fresh=True, adapter=dropped)
    assert policy.peft.peft_config["default"].lora_dropout == 0.5 and policy.hf.training
    assert torch.equal(score(policy), score(policy)) and torch.equal(
        score(policy), score(policy, "reference")
    )
    assert torch.equal(score(policy), score(load(fresh=True, adapter=adapter)))


@pytest.mark.parametrize("family", ("gpt2", "opt"))
def test_a_models_own_dropout_leaves_the_ratio_at_1(model_dir, family):
    """0.1 by default in both; OPT hands its rate to F.dropout, GPT-2 to attention, so Dropout.eval() reaches
    neither.
    """
    policy = Policy.load(
        model_dir(family, num_key_value_heads=None, head_dim=None), device="cpu", dtype="float32"
    )
    assert torch.equal(score(policy), score(policy))


@pytest.mark.parametrize(
    "family, changes", (("lfm2", dict(layer_types=["conv", "full_attention"])), ("stablelm", {}))
)
def test_an_architecture_that_mixes_neighbours_is_refused(model_dir, family, changes):
    """A convolution runs over the end of one text into the next, and scores were wrong by nats without a
    sign.
    """
    with pytest.raises(UserError, match="cannot be scored"):
        Policy.load(model_dir(family, **changes), device="cpu", dtype="float32")


@pytest.mark.parametrize("family, quantize", (("qwen3", "none"), ("qwen3", "nf4"), ("llama", "none")))
def test_a_saved_role_scores_as_before_here_and_as_a_sequence_classifier(load, family, quantize, tmp_path):
    policy = load(family, quantize=quantize)
    parameters = policy.add_role("reward")
    assert policy.sequence_scores(PROMPTS, COMPLETIONS).abs().max() == 0  # a new role says 0
    randomise_all(parameters)
    scores = policy.sequence_scores(PROMPTS, COMPLETIONS)
    assert scores.shape == (2, 3) and scores.dtype == torch.float32
    policy.save_role("reward", tmp_path / "role")

    again = load(family, quantize=quantize)
    assert not any(
        p.requires_grad for p in again.add_role("judge", tmp_path / "role").values()
    )  # by another name, and frozen
    assert all(p.requires_grad for p in again.trainable().values())
    assert torch.equal(again.sequence_scores(PROMPTS, COMPLETIONS, "judge"), scores)
    if quantize == "none":
        # PAD must differ from the EOS at which texts end, or transformers reads the score one token early.
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            policy.source, num_labels=1, pad_token_id=0, dtype=torch.float32
        )
        classifier = PeftModel.from_pretrained(base, str(tmp_path / "role")).eval()
        for b, prompt in enumerate(PROMPTS):
            for g, answer in enumerate(COMPLETIONS[b]):
                logits = classifier(input_ids=torch.tensor([prompt + answer + [0] * 3])).logits
                torch.testing.assert_close(logits[0, 0], scores[b, g], rtol=1e-4, atol=1e-4)


def test_a_role_that_is_none_is_refused(load, shared, adapter, tmp_path):
    policy = load()
    randomise_all(policy.add_role("reward"))
    policy.save_role("reward", good := tmp_path / "good")
    tensors = load_file(good / "adapter_model.safetensors")

    def changed(name, tensors):
        shutil.copytree(good, tmp_path / name)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    missing = dict(list(tensors.items())[1:]) | {HEAD: tensors[HEAD]}
    for directory, reason in (
        (adapter, "no scalar head"),
        (tmp_path, "needs adapter_config.json"),
        (changed("two", tensors | {HEAD: torch.zeros(2, 64)}), "2 outputs"),
        (changed("wide", tensors | {HEAD: torch.zeros(1, 65)}), "not \\(1, 64\\)"),
        (changed("few", missing), "not those of this model's layers"),
    ):
        with pytest.raises(UserError, match=reason):
            load().add_role("judge", directory)
    with pytest.raises(UserError, match="does not fit"):
        load("phi").add_role("judge", good)


# ------------------------------------------------------------------------------------------------------------
# Precision, seeds, NF4


@pytest.mark.parametrize("quantize", ("none", "nf4"))
def test_adapters_stay_fp32_and_move_at_a_tiny_learning_rate(load, quantize):
    """AdamW at 1e-6 moves every parameter by about 1e-6; in bf16 most of matrix A would not move at all."""
    policy = load(dtype="bfloat16", quantize=quantize)
    assert policy.hf.get_input_embeddings().weight.dtype == torch.bfloat16
    params = policy.trainable()
    assert all(p.dtype == torch.float32 for p in params.values())
    before = {n: p.detach().clone() for n, p in params.items()}
    (-policy.token_logps(PROMPTS, COMPLETIONS).sequence_mean().mean()).backward()
    torch.optim.AdamW(params.values(), lr=1e-6, weight_decay=0.0).step()
    for name, p in params.items():
        moved = (p.detach() - before[name]).abs()
        assert p.grad.dtype == torch.float32 and (p.grad != 0).float().mean() > 0.9
        assert 0.9e-6 < moved[p.grad.abs() > 1e-5].mean() < 1.1e-6, name


def test_the_seed_alone_makes_the_adapter(load):
    """Adapters were initialised before the seed was set, so that two runs of one seed differed."""
    torch.manual_seed(1)
    a = load(fresh=True, seed=3).trainable()
    torch.manual_seed(2)
    b, c = load(fresh=True, seed=3).trainable(), load(fresh=True, seed=4).trainable()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if "lora_A" in n)


@pytest.mark.parametrize("family", ("qwen3", "phi"))
def test_nf4_keeps_its_gradient_after_forwards_without_one(load, family):
    """bitsandbytes repacks a CPU weight for good in the first such forward in eval mode, and later gradients
    are None or 0.
    """
    policy = load(family, quantize="nf4")

    def gradients():
        return torch.autograd.grad(
            policy.token_logps(PROMPTS, COMPLETIONS).logps.sum(), list(policy.trainable().values())
        )

    before = gradients()
    score(policy), score(policy, "reference"), policy.generate(PROMPTS, 2, max_new_tokens=4)
    after = gradients()
    assert all(torch.equal(x, y) and y.abs().max() > 0 for x, y in zip(before, after))


# ------------------------------------------------------------------------------------------------------------
# Text


def test_a_prompt_is_the_template_without_thinking(shared):
    """Qwen3 thinks unless enable_thinking=False reaches the template, and each answer then begins with a
    thousand tokens of it.
    """
    expected = "<|im_start|> user list 3 animals <|im_end|> <|im_start|> assistant <think> </think>".split()
    for prompt in ("list 3 animals", [{"role": "user", "content": "list 3 animals"}]):
        assert [WORDS[i] for i in shared().encode_prompt(prompt)] == expected
    messages = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    words = [WORDS[i] for i in shared().encode_prompt(messages)]
    assert (
        words == "<|im_start|> system w1 <|im_end|> <|im_start|> user w2 <|im_end|>".split() + expected[-4:]
    )


def test_prompts_without_a_template_and_with_one_that_refuses(load):
    policy = load(fresh=True)
    policy.tokenizer.chat_template = None
    assert [WORDS[i] for i in policy.encode_prompt("list 3 animals")] == ["list", "3", "animals"]
    assert [
        WORDS[i]
        for i in policy.encode_prompt(
            [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
        )
    ] == ["w1", "w2"]
    policy.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="no system role"):
        policy.encode_prompt("list")


def test_an_answer_ends_with_one_eos(load):
    """Templates and tokenizers that add an EOS of their own gave two, and the model learned to say two."""
    policy = load(fresh=True)
    assert policy.encode_answer("cat dog") == [WORDS.index("cat"), WORDS.index("dog"), END_OF_TURN]
    assert policy.encode_answer("") == [END_OF_TURN]
    adds_eos = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", END_OF_TURN)])
    policy.tokenizer.backend_tokenizer.post_processor = adds_eos
    assert policy.encode_answer("cat dog").count(END_OF_TURN) == 1
    assert policy.decode(policy.encode_answer("cat dog")) == "cat dog"


# ------------------------------------------------------------------------------------------------------------
# Saving and merging


@pytest.mark.parametrize("family, quantize", (("qwen3", "none"), ("gpt_neox", "none"), ("llama", "nf4")))
def test_a_saved_adapter_loads_with_peft(load, tmp_path, family, quantize):
    policy = load(family, quantize=quantize)
    policy.save(tmp_path / "adapter")
    again = load(family, fresh=True, quantize=quantize, adapter=tmp_path / "adapter", seed=9)
    assert torch.equal(score(again), score(policy))
    if quantize == "none":
        theirs = dense_logps(reload(policy.source, tmp_path / "adapter"), PROMPTS[0], COMPLETIONS[0][2], 0.7)[
            0
        ]
        torch.testing.assert_close(score(policy)[0, 2], theirs, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == policy.source


def test_saving_is_whole_or_not_at_all(load, tmp_path, monkeypatch):
    """A disk that fills up in the middle of a checkpoint must not cost the checkpoint before it."""
    policy, out = load(), tmp_path / "runs" / "adapter"
    policy.save(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(directory, **_):
        (directory / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(policy.peft, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            policy.save(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [
        p.name for p in out.parent.iterdir()
    ] == ["adapter"]
    policy.trainable().popitem()[1].data += 1
    policy.save(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} != before and [
        p.name for p in out.parent.iterdir()
    ] == ["adapter"]


@pytest.mark.parametrize("quantize", ("none", "nf4"))
def test_merging_goes_through_16_bit(load, tmp_path, quantize):
    """Merged into 4-bit weights the adapter is rounded away. The result needs no PEFT and says what the
    policy says.
    """
    policy = load(quantize=quantize)
    difference = policy.merge(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
        == policy.tokenizer.chat_template
    )
    unquantised = policy if quantize == "none" else load()
    layer, name = unquantised.hf.model.layers[1].mlp.down_proj, "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(merged.state_dict()[name].float(), merged_weight(layer), rtol=0.01, atol=0.005)
    assert difference < (0.1 if quantize == "none" else 1.0)
    theirs = dense_logps(merged.float(), PROMPTS[0], COMPLETIONS[0][2], 0.7)[0]
    assert (score(unquantised)[0, 2] - theirs).abs().mean() < 0.1


# ------------------------------------------------------------------------------------------------------------
# What a user can get wrong: one line that names the thing


def refused(pattern, *args, **options):
    with pytest.raises(UserError, match=pattern) as caught:
        Policy.load(*args, **dict(device="cpu") | options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_loaded(model_dir, tmp_path):
    refused("no such directory", str(tmp_path / "nowhere"))
    refused("no such directory", "a/b/c")
    refused("no such file", str(tmp_path / "nowhere.gguf"))
    (tmp_path / "empty").mkdir()
    refused("no config.json", str(tmp_path / "empty"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    refused("GGUF", str(tmp_path / "bad.gguf"))
    pickled = tmp_path / "pickled"
    shutil.copytree(model_dir(), pickled)
    (pickled / "model.safetensors").unlink()
    refused("safetensors", str(pickled))
    torch.save({}, pickled / "pytorch_model.bin")  # a pickle runs code when it is read
    refused("safetensors", str(pickled))
    (pickled / "model.safetensors").write_bytes(b"half")
    refused("safetensors", str(pickled))


@pytest.mark.parametrize(
    "options",
    (
        dict(quantize="int8"),
        dict(reference="nobody"),
        dict(dtype="float16"),
        dict(device="cuda:99"),
        dict(device="gpu"),
    ),
)
def test_options_that_do_not_exist(model_dir, options):
    refused(next(iter(options.values())), model_dir(), **options)


def test_a_hub_that_cannot_be_reached_is_one_quick_line(monkeypatch):
    """The download itself retries for a minute and ends in four chained tracebacks."""

    class Session:
        def head(self, *args, **kwargs):
            raise ConnectionError("Name or service not known\nand more")

    def download(*args, local_files_only=False, **kwargs):
        assert local_files_only
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("owner/model.*cannot be reached.*not known.*--model tiny", "owner/model")


def test_adapters_that_cannot_be_loaded(model_dir, adapter, tmp_path):
    def adapter_refused(pattern, directory, model=None):
        refused(pattern, model or model_dir(), adapter=str(directory))

    adapter_refused("adapter_config.json", tmp_path / "nowhere")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(adapter / "adapter_config.json", pickled)
    torch.save({}, pickled / "adapter_model.bin")
    adapter_refused("pickle", pickled)
    (pickled / "adapter_model.safetensors").write_bytes(b"half")
    adapter_refused("model.safetensors cannot be read", pickled)
    (pickled / "adapter_config.json").write_text("{")
    adapter_refused("not JSON", pickled)
    made_for = "does not fit.*it was made for .*qwen3"
    adapter_refused(made_for, adapter, model_dir("qwen3", hidden_size=128))
    adapter_refused(
        made_for, adapter, model_dir("qwen3", num_hidden_layers=1)
    )  # tensors left over would be dropped in silence
    adapter_refused(made_for, adapter, model_dir("gpt_neox"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "option",
    (
        dict(lora_bias=True),
        dict(bias="all"),
        dict(use_dora=True),
        dict(modules_to_save=["lm_head"]),
        dict(target_modules=["embed_tokens"]),
        dict(target_modules=["lm_head"]),
    ),
    ids=str,
)
def test_adapters_that_are_more_than_plain_lora(model_dir, tmp_path, option):
    """Scoring and sampling compute W + s B A. Biases, magnitudes and further weights would be loaded and then
    left out.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir("qwen2"), dtype=torch.float32)
    get_peft_model(
        base, LoraConfig(**dict(task_type="CAUSAL_LM", r=4, target_modules="all-linear") | option)
    ).save_pretrained(tmp_path)
    refused("only plain LoRA|tensors are not", model_dir("qwen2"), adapter=str(tmp_path))
