"""Files and folders that are there whole or not at all, and that one process at a time writes.

    with reserve(out, "reward model", ours=is_reward_model, overwrite=config.overwrite):
        ...                                  # nobody else gets `out`, however long this takes
        with whole_directory(out) as tmp:    # what stands in `out` stands until this block is through
            save(tmp)

A process that is killed holds no lock; what it left half-written beside a place (.NAME.PID.tmp) is removed by
the next one that reserves the place.
"""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

from data.errors import UserError, first_line
from engine.metrics import renamed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

BEYOND = 2**30  # the byte that is locked on Windows, where a locked byte cannot be read: beyond the text


class Taken(UserError):
    """Something stands there already, or another process is writing there."""


# ----------------------------------------------------------------------------------------------------------
# A place to oneself


@contextlib.contextmanager
def reserve(path, kind, ours=None, overwrite=False, remedies=()):
    """Hold `path`, a file or folder to be written, until the block is left; yields it as a Path.

    kind: what will stand there, for the messages; ours(path): whether what stands there is such a thing, and
    overwrite: whether it may then be replaced; remedies: flags that help where it may not. Taken if something
    stands there or another process holds it, UserError for a place that no program should replace.
    """
    path = Path(path)
    refuse_dangerous(path)
    with locked(path):
        check_vacant(path, kind, ours, overwrite, remedies)
        yield path


def check_vacant(path, kind, ours, overwrite, remedies):
    if not is_occupied(path):
        return
    if ours is not None and not ours(path):
        alone = ", so --overwrite leaves it alone" if overwrite else ""
        raise Taken(f"--out {path}: exists already and is not a {kind}{alone}; choose another --out")
    if ours is None or not overwrite:
        ways = ["choose another --out", *remedies]
        raise Taken(f"--out {path}: exists already; {', or '.join(ways)}")


def is_occupied(path):
    """Whether something stands at `path`; an empty folder may be had."""
    try:
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except (OSError, ValueError) as error:
        raise unusable(path, error) from error


def refuse_dangerous(path):
    """UserError for the working directory, its parents, and links: more would be replaced than was meant."""
    try:
        whole, here, link = path.resolve(), Path.cwd(), path.is_symlink()
    except (OSError, ValueError, RuntimeError) as error:
        raise unusable(path, error) from error
    if link:
        raise UserError(
            f"--out {path}: is a link, to {whole}; give that path itself, or choose another --out"
        )
    if whole == here or whole in here.parents:
        raise UserError(f"--out {path}: is or contains the working directory; choose another --out")


def unusable(path, error):
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"--out {path}: cannot be used ({reason}); choose another --out")


@contextlib.contextmanager
def locked(path):
    """Hold the lock of `path` until the block is left. Taken, naming who has it, if another process does.

    The lock is on a file beside it, .NAME.lock, because the folder itself is made and replaced meanwhile.
    """
    try:
        path = Path(path).resolve()
        made = make_parents(path)
        lock = path.with_name(f".{path.name}.lock")
        file = take(lock, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise unusable(path, error) from error
    try:
        clean_up(path)
        yield
    finally:
        release(file, lock)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def make_parents(path):
    """Make the folders above `path` -> those that were missing; a run that comes to nothing leaves none."""
    missing = [folder for folder in path.parents if not folder.exists()][::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def take(lock, path):
    """The open and locked file `lock`, with a line in it that says whose it is."""
    while True:
        file = open(lock, "a+", encoding="utf-8")
        if not try_lock(file):
            file.seek(0)
            who = file.read(200).strip() or "another process"
            file.close()
            raise Taken(f"--out {path}: {who} is writing it; wait for that, or choose another --out")
        if is_still_there(file, lock):
            break
        file.close()  # its last holder has deleted it since it was opened: nobody else would find this lock
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},"
    )
    file.flush()
    return file


def try_lock(file):
    """Whether the lock is ours now; the system takes it back when the process ends, however it ends."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        print("note: this file system has no locks; see to it that no other run writes here", file=sys.stderr)
    return True


def is_still_there(file, lock):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
    except FileNotFoundError:
        return False


def release(file, lock):
    if fcntl:
        lock.unlink(missing_ok=True)  # while it is held: who comes next makes a new one
        file.close()
    else:  # Windows deletes no open file
        file.close()
        with contextlib.suppress(OSError):
            lock.unlink()


# ----------------------------------------------------------------------------------------------------------
# Whole or not at all


@contextlib.contextmanager
def whole_directory(directory):
    """Yield a temporary sibling; on success it takes the directory's place, on failure nothing has changed.

    What stood there is renamed aside first and deleted last, so that at no moment the only copy is half gone.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = sibling(directory, "tmp"), sibling(directory, "old")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir()
        yield tmp
        replace_directory(directory, tmp, old)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def replace_directory(directory, new, old):
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path, content):
    """Write bytes or text under a temporary name, then rename: the file is there whole or as it was."""
    path = Path(path)
    tmp = sibling(path, "tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may be on the disk before the content is
        tmp.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        tmp.unlink(missing_ok=True)


def cannot_write(path, error):
    return UserError(
        f"cannot write {path.name} ({error.strerror}); make room on the disk, or choose another --out"
    )


def sibling(path, ending):
    """Where this process keeps what is to become `path` ("tmp"), or what `path` was ("old")."""
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def clean_up(path):
    """Remove what killed processes left beside `path`; what one had moved aside takes its place again."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", left.name.removeprefix(f".{path.name}"))
        if not found or is_alive(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_alive(pid):
    """Whether another process has this number. Where it cannot be asked without harm, yes."""
    if pid == os.getpid():  # a process of another container, or of another boot
        return False
    if os.name == "nt":  # where os.kill ends it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# ----------------------------------------------------------------------------------------------------------
# JSON


def to_json(value, indent=None):
    """One JSON text, as any reader takes it: NaN and infinities, which JSON does not have, become null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:  # NaN, or an infinity
        return None
    return value


class Damaged(UserError, ValueError):
    """A file is not what was once written to it."""


def read_jsonl(path):
    """The objects of a .jsonl file, by today's names. Damaged, naming the line, for one that is none."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            lines.append(renamed(parse_object(line, f"{path}, line {number}")))
    return lines


def parse_object(text, where):
    """A JSON object from bytes or text, Damaged for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: is damaged ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise Damaged(f"{where}: is damaged (it is no JSON object)")
    return value


def holds(path, *keys):
    """Whether `path` is a file with a JSON object that has these keys: how a folder of ours is known."""
    try:
        return set(keys) <= set(parse_object(path.read_bytes(), path))
    except (OSError, Damaged):
        return False
