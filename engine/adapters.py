"""LoRA adapters on disk: read what PEFT wrote, refuse what is more than plain LoRA, put it into a model.

PEFT's own way of loading would ask the hub for the name that stands in the file, take `target_modules` as a
regular expression of a stranger's, import modules and change the base's weights where a setting says so. Here
an adapter is a few names and numbers, and tensors whose names and shapes must be those of this model's
layers.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import UserError
from engine.models import first_line

HEAD = "base_model.model.score.weight"  # what PEFT calls the head of a sequence classifier
MOST = 2**20  # bytes of adapter_config.json; a real one has about a thousand
LARGEST_RANK = 8192

# What shapes a plain adapter; any other setting of LoraConfig must be what it is by default.
PLAIN = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out",
)  # fmt: skip
# What says how it began, or by whom it was written; it has no part in what the adapter computes.
HISTORY = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "init_lora_weights", "eva_config", "runtime_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
# Other ways to begin (pissa, olora, corda, loftq...) take a part out of the base's weights.
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter(directory: str | Path) -> tuple[dict, dict, str]:
    """A saved adapter -> (tensors by name, its settings as in PLAIN, the name of the model it was made for).

    UserError for a directory without one, for damaged or pickled files, and for anything but plain LoRA.
    """
    path = Path(directory)
    settings, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not settings.is_file() or not weights.is_file():
        raise UserError(
            f"adapter {directory}: needs adapter_config.json and adapter_model.safetensors "
            "(pickled weights are not read)"
        )
    config = read_settings(settings, directory)
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"adapter {directory}: adapter_model.safetensors cannot be read ({first_line(error)})"
        ) from error
    try:
        check_plain(config)
    except ValueError as error:
        raise UserError(f"adapter {directory}: {first_line(error)}") from error
    shape = {name: config[name] for name in PLAIN if config.get(name) is not None}
    return tensors, shape, str(config.get("base_model_name_or_path"))[:200]


def read_role(directory: str | Path) -> tuple[dict, dict]:
    """A saved role -> (tensors by name, shape); UserError for one without a head, or with several outputs."""
    tensors, shape, _ = read_adapter(directory)
    if HEAD not in tensors:
        raise UserError(
            f"adapter {directory}: has no scalar head ({HEAD}), so it scores nothing; "
            "is it a policy's adapter?"
        )
    if len(tensors[HEAD]) != 1:
        raise UserError(
            f"adapter {directory}: its head has {len(tensors[HEAD])} outputs; a score is one number"
        )
    return tensors, shape


def read_settings(file, directory):
    """adapter_config.json -> dict; UserError for a file that holds none."""
    if file.stat().st_size > MOST:
        raise UserError(f"adapter {directory}: adapter_config.json has more than {MOST // 2**20} MiB")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"adapter {directory}: adapter_config.json is not JSON ({first_line(error)})"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"adapter {directory}: adapter_config.json is a {type(config).__name__}, not PEFT's settings"
        )
    return config


def check_plain(config):
    """ValueError for settings that are not those of plain LoRA on layers named in plain words."""
    if config.get("peft_type", "LORA") != "LORA" or config.get("init_lora_weights", True) not in BEGINNINGS:
        raise ValueError(
            f"is {config.get('peft_type')}, begun as {config.get('init_lora_weights')!r}: "
            "only plain LoRA on the linear layers is supported"
        )
    for field in dataclasses.fields(LoraConfig):
        value = config.get(field.name)
        # A role saved as a sequence classifier names its head here.
        head = field.name == "modules_to_save" and value == ["score"]
        if value and value != field.default and not head and field.name not in PLAIN + HISTORY:
            raise ValueError(f"sets {field.name}; only plain LoRA on the linear layers is supported")
    # PEFT takes a string, and the patterns' keys, as regular expressions, and some of those take for ever.
    names = [
        config.get("target_modules"),
        config.get("exclude_modules") or [],
        config.get("layers_pattern") or [],
    ]
    for value in names:
        if value != "all-linear" and not (isinstance(value, list) and all(map(plain_name, value))):
            raise ValueError(f"wants its layers as a list of plain names, not {str(value)[:60]!r}")
    for pattern, number in (("rank_pattern", whole_number), ("alpha_pattern", real_number)):
        value = config.get(pattern) or {}
        if not (isinstance(value, dict) and all(map(plain_name, value)) and all(map(number, value.values()))):
            raise ValueError(f"{pattern} is not a table of plain names and numbers")
    if not whole_number(config.get("r", 8)) or not real_number(config.get("lora_alpha", 8)):
        raise ValueError(
            f"r is {config.get('r')!r} and lora_alpha {config.get('lora_alpha')!r}; no usable numbers"
        )


def plain_name(name):
    return isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) is not None


def whole_number(value):
    return type(value) is int and 1 <= value <= LARGEST_RANK


def real_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def trainable(model: PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by name."""
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and f".{adapter}." in n}


def saved_names(model: PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by the names that PEFT's files give them."""
    return {n.replace(f".{adapter}.", "."): p for n, p in trainable(model, adapter).items()}


@torch.no_grad()
def fill(parameters: dict, tensors: dict) -> None:
    """Copy tensors into the parameters of the same names; ValueError if names or shapes are not the same."""
    if set(tensors) != set(parameters):
        raise ValueError("its tensors are not those of this model's layers")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])
