"""Models and adapters as files: what is asked of the hub, what is refused, and what a bad file is called."""

import errno
import json
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import WORDS, write_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import policy as policy_module
from data import UserError
from engine import models
from policy import Policy

CPU = dict(device="cpu", dtype="float32")


@pytest.fixture
def asked(monkeypatch):
    """What is asked of a network, which gives no answer. Offline mode, which would hide it, is off."""
    found = []

    def send(self, request, **options):
        found.append(str(request.url))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(huggingface_hub.get_session()), "send", send)
    return found


def copied(model, directory, file=None, **changes):
    """A copy of a model's directory; `changes` go into one of its JSON files."""
    shutil.copytree(model, directory)
    if file:
        content = json.loads((directory / file).read_text()) | changes
        (directory / file).write_text(json.dumps(content))
    return str(directory)


def refused(pattern, model, **options):
    with pytest.raises(UserError, match=pattern) as caught:
        Policy.load(model, **CPU | options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# The hub


def test_an_adapter_never_asks_the_hub(load, asked, tmp_path):
    """PEFT looked up the base's name, data/tiny, on the hub, where a stranger could own it."""
    policy = load()
    policy.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": "data/tiny"}
    file.write_text(json.dumps(content))
    again = load(fresh=True, adapter=tmp_path / "adapter")
    again.save(tmp_path / "again")
    again.merge(tmp_path / "merged")
    assert asked == []


def test_an_adapter_of_the_embedded_model_loads_anywhere(tmp_path, monkeypatch):
    """Its base was called data/tiny, which PEFT found from one working directory only."""
    policy = Policy.load("tiny", **CPU)
    policy.save(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = policy.encode_prompt("list 3 animals") + [5, 6]
    logits = loaded(input_ids=torch.tensor([ids])).logits[0, -3:-1].log_softmax(-1)
    ours = policy.token_logps([ids[:-2]], [[ids[-2:]]]).logps[0, 0]
    torch.testing.assert_close(logits.gather(-1, torch.tensor([[5], [6]]))[:, 0], ours, rtol=1e-4, atol=1e-4)


def test_how_a_base_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/model").mkdir(parents=True)
    local = str(tmp_path / "owner/model")
    assert models.base_name("owner/model", "owner/model") == local  # a directory that reads like a hub name
    assert models.base_name("file.gguf", local) == local
    assert models.base_name("owner/other", "/cache/snapshot") == "owner/other"


# ------------------------------------------------------------------------------------------------------------
# Files of a model


def test_a_model_that_lacks_weights_is_refused(model_dir, tmp_path):
    """transformers makes them up at random and says so in a log that is switched off: it trained on noise."""
    directory = copied(model_dir("llama"), tmp_path / "lacking")
    weights = load_file(f"{directory}/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    del weights[name]
    save_file(weights, f"{directory}/model.safetensors", {"format": "pt"})
    refused(f"lack 1 of the weights .{name}.*download", directory)
    assert "lm_head.weight" not in load_file(f"{model_dir('qwen3')}/model.safetensors")
    Policy.load(model_dir("qwen3"), **CPU)  # tied to the embeddings, so not missing


@pytest.mark.parametrize(
    "name", ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
)
def test_a_config_does_not_choose_the_attention(model_dir, tmp_path, name):
    """It beats the argument of from_pretrained, and a name with a slash is a kernel that is downloaded."""
    directory = copied(model_dir(), tmp_path / "model", "config.json", **{name: "owner/kernel"})
    refused("config.json sets .*owner/kernel", directory)
    copied(model_dir(), tmp_path / "nested", "config.json", text_config={name: "flash_attention_2"})
    refused("config.json sets .*flash", str(tmp_path / "nested"))


@pytest.mark.parametrize("file", ("model.bin", "../model.safetensors"))
def test_an_index_leads_to_safetensors_beside_it_only(model_dir, tmp_path, file):
    """An index called safetensors may name a pickle, which runs code when it is read."""
    directory = Path(copied(model_dir(), tmp_path / "model"))
    (directory / "model.safetensors").rename(directory / "model.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("no safetensors file beside it", str(directory))


def test_tokenizers_and_templates_that_cannot_be_used(model_dir, tmp_path):
    """Each of these was a traceback in the middle of a run, or a run that never began."""
    directory = copied(model_dir(), tmp_path / "few")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(directory)
    refused(f"{len(WORDS) + 1} tokens and the model {len(WORDS)}", directory)

    directory = copied(model_dir(), tmp_path / "eos", "generation_config.json", eos_token_id="x")
    refused("eos_token_id 'x'", directory)
    directory = copied(model_dir(), tmp_path / "far", "generation_config.json", eos_token_id=[3, 10**6])
    refused("eos_token_id '1000000'", directory)

    directory = copied(model_dir(), tmp_path / "long")
    write_tokenizer(directory, "x" * (models.LONGEST_TEMPLATE + 1))
    refused("chat template has more than", directory)

    directory = copied(model_dir(), tmp_path / "empty")
    write_tokenizer(directory, "{% if false %}x{% endif %}")
    with pytest.raises(UserError, match="nothing is left of the prompt 'list'"):
        Policy.load(directory, **CPU).encode_prompt("list")


# ------------------------------------------------------------------------------------------------------------
# Files of an adapter


@pytest.mark.parametrize(
    "changes, reason",
    (
        (dict(target_modules=r"(\w*)*!"), "list of plain names"),  # a regular expression that never ends
        (dict(exclude_modules=r"(\w*)*!"), "list of plain names"),
        (dict(rank_pattern={r"(\w*)*!": 4}), "rank_pattern"),
        (dict(target_modules=None), "list of plain names"),
        (dict(r=10**9), "r is 1000000000"),
        (dict(r="4"), "r is '4'"),
        (dict(init_lora_weights="pissa"), "only plain LoRA"),  # would take a part out of the base's weights
        (dict(use_dora=True), "sets use_dora"),
        (dict(peft_type="VERA"), "is VERA"),
    ),
)
def test_adapter_settings_that_are_refused(load, tmp_path, changes, reason):
    load().save(tmp_path / "adapter")
    directory = copied(tmp_path / "adapter", tmp_path / "changed", "adapter_config.json", **changes)
    refused(reason, load().source, adapter=directory)


def test_an_adapter_config_that_is_none(load, tmp_path):
    load().save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for content, reason in (("[]", "is a list"), ("[" * 10**5, "not JSON"), (" " * 2**21, "more than 1 MiB")):
        file.write_text(content)
        refused(reason, load().source, adapter=tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------------------
# The device's own errors


@pytest.mark.parametrize("kind", (torch.OutOfMemoryError, torch.AcceleratorError))
@pytest.mark.parametrize("place", ("loading", "adapter", "packing"))
def test_an_error_of_the_device_is_not_called_the_models(load, monkeypatch, tmp_path, kind, place):
    """Out of memory while loading became "cannot be loaded as a causal LM", a driver's "cannot be scored"."""
    policy = load()
    policy.save(tmp_path / "adapter")

    def fail(*args, **options):
        raise kind("the device's own words")

    if place == "loading":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    else:
        monkeypatch.setattr(policy_module, {"adapter": "fill", "packing": "packing_error"}[place], fail)
    with pytest.raises(kind, match="own words"):
        Policy.load(policy.source, adapter=tmp_path / "adapter", **CPU)


# ------------------------------------------------------------------------------------------------------------
# GGUF


class Half:
    """Stands for a model and a tokenizer that were read from GGUF."""

    def __init__(self, error=None):
        self.error = error

    def save_pretrained(self, directory):
        if self.error:
            raise self.error
        (directory / "config.json").write_text("{}")


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "error", (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device"))
)
def test_a_full_disk_is_not_called_an_unreadable_file(gguf, monkeypatch, error):
    monkeypatch.setattr(models, "read_gguf", lambda path: (Half(error), Half()))
    with pytest.raises(UserError, match="cannot be written.*No space left.*XDG_CACHE_HOME"):
        models.find_model(str(gguf))
    assert [p for p in (gguf.parent / "cache" / "minigrao").iterdir() if p.is_dir()] == []


def test_two_that_convert_one_file_do_so_once(gguf, monkeypatch):
    """The second deleted what the first had just written and was reading."""
    read, found = [], []

    def slow(path):
        read.append(path)
        time.sleep(0.3)
        return Half(), Half()

    monkeypatch.setattr(models, "read_gguf", slow)
    both = [threading.Thread(target=lambda: found.append(models.find_model(str(gguf)))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(read) == 1 and len(set(found)) == 1 and (Path(found[0]) / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "argv, words",
    (
        ([], "required"),
        (["sing", "x", "--model", "tiny", "--out", "y"], "invalid choice"),
        (["merge", "nowhere", "--model", "tiny", "--out", "OUT"], "needs adapter_config.json"),
        (["merge", "nowhere", "--model", "tiny", "--out", "HERE"], "exists"),
    ),
)
def test_policy_py_says_what_is_wrong_in_one_line(argv, words, tmp_path, capsys):
    """It printed argparse's usage, several lines without a word about the remedy."""
    (tmp_path / "notes.txt").write_text("of the user")
    places = {"OUT": str(tmp_path / "out"), "HERE": str(tmp_path)}
    argv = [places.get(word, word) for word in argv]
    assert policy_module.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_merge_as_a_command(load, tmp_path, capsys):
    policy = load()
    policy.save(tmp_path / "adapter")
    flags = ["--model", policy.source, "--out", str(tmp_path / "merged")]
    assert policy_module.main(["merge", str(tmp_path / "adapter"), *flags]) == 0
    assert "a 16-bit model" in capsys.readouterr().out and (tmp_path / "merged" / "config.json").is_file()
