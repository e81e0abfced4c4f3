"""The benchmark's parts in order, what each will take at most, and a run through them that keeps to it.

An estimate is the machine's limit for a step over a share of it that both sides were always seen to reach,
plus loading. It is generous on purpose: it is printed first and then kept, by leaving out what no longer
fits.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.models import first_line
from plots.bench.limits import limits

SHARES = {"ours": 0.2, "TRL": 0.04}  # of the limit: seen 0.29 to 0.6, and 0.05 to 0.25
LOADING = {"ours": 20.0, "TRL": 45.0}  # seconds, on two shared cores
OVERHEAD = 2.0  # seconds a step: what an embedded model takes, whose products are next to nothing


@dataclass(frozen=True)
class Step:
    """A part of the benchmark that is measured whole or left out."""

    part: str  # its name for --only
    title: str
    key: str  # where its result stands in the JSON
    seconds: float  # at most
    work: Callable
    many: bool = False  # one of several results under the key


def case_seconds(case, sides, repeats, rates, warm=1):
    """At most for a case: its sides loaded, and their steps one after another."""
    limit = sum(limits(case, rates).values())
    return sum(LOADING[side] + (warm + repeats) * (OVERHEAD + limit / SHARES[side]) for side in sides)


class OutOfTime(Exception):
    """A part took longer than all that was left of the estimate."""


@contextlib.contextmanager
def at_most(seconds):
    """Within it, OutOfTime after so many seconds, whatever is waited for; where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise OutOfTime(f"not done in the {seconds:.0f} s that were left")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def announce(steps, minutes):
    """Print what it will take at most, by part -> that, in seconds. minutes: of --minutes, or None."""
    by_part = {}
    for step in steps:
        by_part[step.part] = by_part.get(step.part, 0.0) + step.seconds
    total = sum(by_part.values())
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in by_part.items())
    allowed = total if minutes is None else min(total, 60 * minutes)
    cut = "" if allowed == total else f", cut to {minutes:g} by --minutes"
    print(
        f"at most {total / 60:.0f} minutes{cut} ({parts}); what does not fit is left out by name", flush=True
    )
    return allowed


def go_through(steps, allowed, result, after=lambda: None):
    """Do the steps within `allowed` seconds, into result[key]; result["left_out"]: {title: reason} of the
    rest.

    after: called behind each step that was measured.
    """
    began, left_out = time.monotonic(), result.setdefault("left_out", {})
    for step in steps:
        left = allowed - (time.monotonic() - began)
        if step.seconds > left + 1:  # a second: the first step may take all of the estimate
            reason = f"may take {step.seconds:.0f} s, {max(left, 0):.0f} s are left"
        else:
            reason = attempt(step, left, result)
        if reason is None:
            after()
        else:
            left_out[step.title] = reason
            print(f"left out: {step.title}: {reason}", file=sys.stderr, flush=True)
    return result


def attempt(step, left, result):
    """Do one step -> None, or in one line why it could not be done."""
    try:
        with at_most(left):
            measured = step.work()
    except Exception as error:  # whatever a library cannot do on this machine: the other parts still can
        return first_line(error)
    if step.many:
        result.setdefault(step.key, []).append(measured)
    else:
        result[step.key] = measured
    return None
