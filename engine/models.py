"""Models on disk and in memory: find one (embedded, a directory, a GGUF file, the hub), load it and look
whether it is whole, pick device and compute type, write whole directories.
"""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before torch starts CUDA: segments that grow leave no holes, where texts of ever other lengths take and give
# back memory. On a card of 6 GB those holes are what runs out.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from data.errors import UserError, first_line  # noqa: E402
from engine.folders import whole_directory  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
TINY = Path(__file__).parents[1] / "data" / "tiny"
TRIM_EVERY = 10  # steps; at every step it would cost a tiny model a fifth of its time
# The device's own troubles, never the model's fault: they pass through with their own words.
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
# characters; real chat templates have at most some ten thousand, and Jinja compiles them
LONGEST_TEMPLATE = 2**20
GLIBC = ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor: given back and mapped anew, every large temporary
    costs its page faults.
    """
    if GLIBC:
        GLIBC.mallopt(M_MMAP_MAX, 0)
        GLIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def trim_memory(step: int) -> None:
    """Every few steps, give back what was freed: tensors of ever other lengths leave ever more holes."""
    if GLIBC and step % TRIM_EVERY == 0:
        GLIBC.malloc_trim(0)


def pick_device(device: str, quantize: str = "nf4") -> torch.device:
    """auto: a CUDA GPU, else Apple's where nothing is quantised (bitsandbytes' NF4 has no kernels for it)."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        apple = quantize == "none" and torch.backends.mps.is_available()
        return torch.device("mps" if apple else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device}: not usable here ({first_line(error)}); try --device cpu"
        ) from error
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device, model: str) -> torch.dtype:
    """The compute type: bf16 where the hardware multiplies it natively; fp32 for tiny, too small to gain."""
    if dtype in ("float32", "bfloat16"):
        return getattr(torch, dtype)
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    if device.type == "cuda":
        # By emulation it is "supported" on RTX 20, GTX 16 and T4, slowly and without a fast attention kernel.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and model != "tiny" else torch.float32


def find_model(model: str) -> str:
    """A model's local directory: the embedded one, a directory, a converted GGUF file, or a hub snapshot
    (downloaded if needed).
    """
    if model == "tiny":
        return str(TINY)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(
                f"model {model}: the directory has no config.json, so it is not a transformers model"
            )
        return str(path)
    if str(model).endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model {model}: no such file")
        return convert_gguf(path)
    if str(model).count("/") != 1 or str(model)[0] in "./~":
        raise UserError(
            f"model {model}: no such directory, and not a hub name (owner/name); try --model tiny"
        )
    import huggingface_hub as hub

    wanted = dict(allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    try:
        return hub.snapshot_download(model, local_files_only=True, **wanted)
    except Exception:  # any of the hub's many error types
        pass  # not cached yet
    help_ = "try --model tiny, a local directory, or a .gguf file"
    try:
        # The download itself would retry for a minute.
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise UserError(f"model {model}: the hub cannot be reached ({first_line(error)}); {help_}") from error
    try:
        return hub.snapshot_download(model, **wanted)
    except Exception as error:
        raise UserError(f"model {model}: the hub does not give it ({first_line(error)}); {help_}") from error


def base_name(model: str, source: str) -> str:
    """How an adapter's file names its base: a hub name, or the absolute path of the loaded directory.

    A relative path such as data/tiny reads like a hub name, which a stranger could own; and whoever loads the
    adapter (peft.AutoPeftModelForCausalLM, say) finds the base of a GGUF file only where it was converted to.
    """
    local = model == "tiny" or str(model).endswith(".gguf") or Path(model).is_dir()
    return os.path.abspath(source) if local else str(model)


def convert_gguf(path: Path) -> str:
    """Read a GGUF file once (slow: it is dequantised); its copy, a directory in the user's cache, stays."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minigrao" / f"{path.stem}-{key}"
    if out.is_dir():
        return str(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes the second waits, and finds what the first has made.
        with file_lock(out.parent / f".{out.name}.lock"):
            if not out.is_dir():
                print(f"converting {path.name} to {out} (once)", file=sys.stderr)
                model, tokenizer = read_gguf(path)
                with quiet(), whole_directory(out) as tmp:
                    model.save_pretrained(tmp)
                    tokenizer.save_pretrained(tmp)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError as well
        raise UserError(
            f"model {path}: its converted copy cannot be written to {out.parent} ({first_line(error)}); "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return str(out)


def read_gguf(path):
    """A GGUF file -> (model in fp32 that can be saved, tokenizer)."""
    try:
        with quiet():
            folder, options = str(path.parent), {"gguf_file": path.name}
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            # A model read from GGUF refuses to be saved; the same weights in a model of its config do not.
            del loaded.config.quantization_config
            plain = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
    except ImportError as error:
        raise UserError(f"model {path}: reading GGUF needs the gguf package: pip install gguf") from error
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # whatever gguf and transformers make of bytes that are none
        raise UserError(
            f"model {path}: not a readable GGUF file of a known architecture ({first_line(error)})"
        ) from error
    return plain, tokenizer


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Within the block hold a lock, waited for; a dead process's is let go. On Windows there is none."""
    with open(path, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------------------
# Loading


def load_model(auto_class: type, source: str, who: str, kind: str, **options) -> tuple:
    """A model's directory -> (tokenizer, model, names of weights that its files lack); safetensors only.

    auto_class: the class of transformers; who: "model NAME", for errors; kind: "causal LM"; options: of
    from_pretrained. UserError for a directory that cannot be used. transformers makes up weights that are
    missing, at random, and says so in a log that is switched off: the caller must look at the third.
    """
    local = dict(trust_remote_code=False, local_files_only=True)
    try:
        check_files(Path(source))
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **local)
            model, report = auto_class.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **local, **options
            )
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # transformers' OSError, ValueError, KeyError, SafetensorError and others
        raise UserError(
            f"{who}: cannot be loaded as a {kind} with safetensors weights ({first_line(error)})"
        ) from error
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise UserError(
            f"{who}: its tokenizer has {len(tokenizer)} tokens and the model {rows}; "
            "they do not belong together"
        )
    if len(str(tokenizer.chat_template or "")) > LONGEST_TEMPLATE:
        raise UserError(f"{who}: its chat template has more than {LONGEST_TEMPLATE} characters")
    return tokenizer, model, sorted(report["missing_keys"])


def check_files(source):
    """ValueError where a model's files would lead transformers to other code than ours, or to pickles."""
    pending = [json.loads((source / "config.json").read_text(encoding="utf-8"))]
    while pending:  # config.json and the configs within it
        config = pending.pop()
        if not isinstance(config, dict):
            continue
        pending += config.values()
        for name, value in config.items():
            # It beats the argument of from_pretrained, and may name a kernel to be downloaded.
            if "attn_implementation" in name and value not in (None, "eager", "sdpa"):
                raise ValueError(f"config.json sets {name} to {str(value)[:60]!r}; take the line out")
    index = source / "model.safetensors.index.json"
    if index.is_file():
        for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if not str(file).endswith(".safetensors") or Path(file).name != file:
                raise ValueError(
                    f"{index.name} names {str(file)[:60]!r}, which is no safetensors file beside it"
                )


def end_ids(hf, tokenizer, who: str) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS, and those of the generation config (Qwen3 has two)."""
    given = hf.generation_config.eos_token_id if hf.generation_config else None
    given = given if isinstance(given, (list, tuple)) else [given]
    ids = [token for token in [*given, tokenizer.eos_token_id] if token is not None]
    rows = len(hf.get_input_embeddings().weight)
    for token in ids:
        if type(token) is not int or not 0 <= token < rows:
            raise UserError(f"{who}: its eos_token_id {str(token)[:60]!r} is none of its {rows} tokens")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{who}: its tokenizer names no end-of-sequence token, so answers could not end")
    return sorted(set(ids))


def switch_off_dropout(hf) -> None:
    """The rates of Dropout modules, and those that OPT and others hand to F.dropout or to attention."""
    for module in hf.modules():
        for name, rate in list(vars(module).items()):
            if isinstance(rate, float) and (isinstance(module, torch.nn.Dropout) or "drop" in name):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' harmless noise (a missing optional CPU kernel, loading reports) from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
