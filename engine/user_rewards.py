"""A user's own reward: a Python file that is loaded, a function that is called; whatever happens in them is
one line.

    # my_reward.py, used as --reward my_reward.py:brevity
    def brevity(prompts, completions, **columns):
        return [-float(len(text.split())) for text in completions]
"""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

from data import UserError

LARGEST = 3.4028234663852886e38  # of fp32, the type of rewards in training


def load_function(name: str) -> Callable:
    """FILE.py:FUNCTION -> the function; UserError for a file that cannot be run or has no such function.

    The file may import its neighbours: its directory is on sys.path while it loads, as for `python FILE.py`.
    It is in sys.modules before it runs, since dataclasses look their module up there.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--reward {name}: no file {path}")
    folder = str(Path(path).resolve().parent)
    # not the stem alone: a file called reward.py must not be ours
    module_name = f"user_reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function)
    except (Exception, SystemExit) as error:  # it is the user's program
        raise UserError(f"--reward {name}: cannot be loaded ({said(error)})") from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UserError(f"--reward {name}: {function} is a {type(found).__name__}, not a function")
    return found


def checked_rewards(reward_fn: Callable, prompts: list, completions: list, columns: dict) -> list[float]:
    """Call a user's reward function -> list[float]; whatever goes wrong in it becomes a one-line UserError.

    It is handed copies: a function that strips a completion or sorts a list in place would change the run's
    records.
    """
    name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    given = copy.deepcopy(dict(columns, prompts=prompts, completions=completions))
    try:
        rewards = plain(reward_fn(**given))
        rewards = [plain(value) for value in rewards] if isinstance(rewards, (list, tuple)) else rewards
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the function is the user's: anything can come out of it
        raise UserError(f"reward function {name}: raised {said(error)}") from error
    if not isinstance(rewards, list):
        raise UserError(
            f"reward function {name}: returned {type(rewards).__name__}; return one number per completion"
        )
    if len(rewards) != len(completions):
        raise UserError(
            f"reward function {name}: returned {len(rewards)} rewards for {len(completions)} completions"
        )
    for i, value in enumerate(rewards):
        if isinstance(value, (list, tuple)):
            raise UserError(
                f"reward function {name}: item {i} is a list; return one number, not one per token"
            )
        if not isinstance(value, (int, float)) or value != value or abs(value) == math.inf:
            raise UserError(f"reward function {name}: item {i} is {shown(value)}; return a finite number")
        if abs(value) > LARGEST:  # finite here, infinite in the tensor that is trained with
            raise UserError(
                f"reward function {name}: item {i} is {shown(value)}, beyond fp32's {LARGEST:.3g}; "
                "return a smaller number"
            )
    return [float(value) for value in rewards]


def plain(value):
    """Arrays, tensors and their numbers as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def said(error: BaseException) -> str:
    """An exception in one line, even if it cannot say what it is."""
    try:
        words = " ".join(str(error).split())[:200]
    except Exception:
        words = "and its message cannot be read"
    return f"{type(error).__name__}: {words}"


def shown(value) -> str:
    """A value in one short line, even if its repr raises."""
    try:
        return " ".join(repr(value).split())[:80]
    except Exception:
        return f"a {type(value).__name__}"
