"""Models on disk and in memory: find one (embedded, a directory, a GGUF file, the hub), pick device and compute type, write whole directories."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path

# Before torch starts CUDA: segments that grow leave no holes, where texts of ever other lengths take and give
# back memory. On a card of 6 GB those holes are what runs out.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
import torch  # noqa: E402
import transformers  # noqa: E402

from data import UserError  # noqa: E402

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
TINY = Path(__file__).parents[1] / "data" / "tiny"
TRIM_EVERY = 10  # steps; at every step it would cost a tiny model a fifth of its time
GLIBC = ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor: given back and mapped anew, every large temporary costs its page faults."""
    if GLIBC:
        GLIBC.mallopt(M_MMAP_MAX, 0)
        GLIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def trim_memory(step):
    """Every few steps, give back what has been freed: tensors of ever other lengths leave holes, and the process would grow for hours."""
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


def pick_dtype(dtype, device, model):
    """The compute type: bf16 where the hardware multiplies it natively; fp32 for the tiny model, too small to gain from bf16."""
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


def find_model(model):
    """A model's local directory: the embedded one, a directory, a converted GGUF file, or a hub snapshot (downloaded if needed)."""
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
    except Exception:  # not cached yet: any of the hub's many error types
        pass
    help_ = "try --model tiny, a local directory, or a .gguf file"
    try:
        hub.get_session().head(
            hub.constants.ENDPOINT, timeout=5
        )  # the download itself would retry for a minute
    except Exception as error:
        raise UserError(f"model {model}: the hub cannot be reached ({first_line(error)}); {help_}") from error
    try:
        return hub.snapshot_download(model, **wanted)
    except Exception as error:
        raise UserError(f"model {model}: the hub does not give it ({first_line(error)}); {help_}") from error


def convert_gguf(path):
    """Read a GGUF file once (slow: it is dequantised) and keep it as a safetensors directory in the user's cache."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minigrao" / f"{path.stem}-{key}"
    if out.is_dir():
        return str(out)
    print(f"converting {path.name} to {out} (once)", file=sys.stderr)
    try:
        with quiet():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            # A model read from GGUF refuses to be saved; the same weights in a model built from its plain config do not.
            del loaded.config.quantization_config
            plain = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
            with whole_directory(out) as tmp:
                plain.save_pretrained(tmp)
                tokenizer.save_pretrained(tmp)
    except ImportError as error:
        raise UserError(f"model {path}: reading GGUF needs the gguf package: pip install gguf") from error
    except Exception as error:
        raise UserError(
            f"model {path}: not a readable GGUF file of a known architecture ({first_line(error)})"
        ) from error
    return str(out)


@contextlib.contextmanager
def whole_directory(directory):
    """Yield a temporary sibling; on success it takes the directory's place, on failure it is removed and nothing has changed."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    tmp = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir()
        yield tmp
        if directory.exists():
            shutil.rmtree(directory)
        tmp.rename(directory)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def quiet():
    """Keep the libraries' harmless noise (a missing optional CPU kernel, loading reports) from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
