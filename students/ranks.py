"""The processes of a run, as the rest of the project needs them: shares of a list, what is common to all, and a common end.

Whatever launches them (`accelerate launch`, `torchrun`) names them in the environment; one process alone needs nothing.

A process that ends with an error leaves a note in the launcher's key-value store before its connections close. The others,
who wait for it in an exchange at that moment or the next, find the connection closed, read the note and end with the same
error. Where there is no note, it was killed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

import omniopd.errors as errors
from omniopd.errors import ConfigError, OmniError, RunError
from students.parcels import Parcels

T = TypeVar("T")

RANK_TIMEOUT_S = 1800.0
_NOTE_S, _LINGER_S = 10.0, 60.0  # how long the store of notes may take to answer, and its readers to come


class Ranks:
    """This process among those of the run. Every method but `mine` is called by all of them at the same place, or by none.

    Attributes:
        index: 0, 1, ...
        count: how many there are.
        node: the machine that this one is on, 0, 1, ...
        sharded: whether the launcher asks for the weights to be spread over the processes (FSDP2).
    """

    index = 0
    count = 1
    node = 0
    sharded = False
    on_cpu = False
    device = torch.device("cpu")

    def __init__(self, timeout_s: float = RANK_TIMEOUT_S) -> None:
        """Join the others.

        Args:
            timeout_s: how long one process waits for another before the run ends.

        Raises:
            ConfigError: the launcher asks for FSDP1.
            RunError: the others can't be reached.
        """
        self.timeout_s = timeout_s
        self._terminated = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._join()

    def _join(self) -> None:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
            "false"  # every process reads the weights: it looks at them first
        )
        self.on_cpu = not torch.accelerator.is_available()
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("accelerate's fsdp_version is 1; set fsdp_version: 2 in its config file")
        patience = timedelta(seconds=self.timeout_s)
        try:
            state = PartialState(cpu=self.on_cpu, timeout=patience)
            # On the CPU, and apart from the gradients: a dead process is noticed at once, on any device.
            self._group: Any = dist.new_group(backend="gloo", timeout=patience)
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_NOTE_S)
            )
        except (RuntimeError, KeyError, ValueError) as error:
            raise RunError(f"the other processes can't be reached: {_first_line(error)}; start all of them") from None
        self._notes = dist.PrefixStore(f"omniopd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.index, self.count = state.process_index, state.num_processes
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        self.device = state.device
        self._keeps_notes = self.main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._parcels = Parcels()
        atexit.register(_leave)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.index == 0

    def enter_thread(self) -> None:
        """Make this process's device the one of a thread that has just begun."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    # ------------------------------------------------------------------ exchange

    def mine(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This process's share of a list that all have, every `count`-th item, with its places."""
        return [(place, items[place]) for place in range(self.index, len(items), self.count)]

    def all(self, part: T) -> list[T]:
        """What every process has here, in their order; each `part` can be pickled.

        Of the others' `Distributions` only the shape arrives (see `Parcels`).
        """
        if self.count == 1:
            return [part]
        parcels: list[Any] = [None] * self.count
        dist.all_gather_object(parcels, self._parcels.pack(part), group=self._group)
        return [part if index == self.index else self._parcels.open(parcel) for index, parcel in enumerate(parcels)]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, the only one that does it."""
        return self.all(work() if self.main else None)[0]  # type: ignore[return-value]

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.all(number))

    # ------------------------------------------------------------------ a common end

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What ends one process in this block ends all of them with the same error, which one of them says.

        Raises:
            RunError: another process was killed, or did not come to an exchange in time.
        """
        if self.count == 1:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("processes end alike from their main threads only")
        before = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all once one has ended: we are about to
            atexit.unregister(_leave)  # the others may be gone without it
            raise self._settled(error) from None
        signal.signal(signal.SIGTERM, before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """The launcher has seen another process end. Stop in order, as if interrupted."""
        if not self._terminated:
            self._terminated = True
            signal.raise_signal(signal.SIGINT)

    def _settled(self, error: BaseException) -> BaseException:
        """The error that this process ends with: its own, which the others are told, or another's."""
        lost = _is_lost(error) or (self._terminated and isinstance(error, KeyboardInterrupt))
        noted = self._told() if lost else None
        if lost:
            error = noted or self._died(error)
        else:
            self._tell(error)
        if isinstance(error, OmniError):
            error.said = not self._is_first()
        self._part(wait=not lost or noted is not None)
        return error

    def _died(self, error: BaseException) -> RunError:
        kept = "the last checkpoint is kept, continue with --resume"
        if "timed out" in str(error).lower():
            return RunError(
                f"train.rank_timeout_s: another process of the run did not come within {self.timeout_s:g} s; raise it if "
                f"that may take longer; {kept}"
            )
        return RunError(f"another process of the run has died (killed, or out of memory); {kept}")

    def _tell(self, error: BaseException) -> None:
        name, text = type(error).__name__, str(error)
        if not isinstance(error, OmniError | KeyboardInterrupt):
            name, text = "RunError", f"process {self.index} of the run failed: {name}: {_first_line(error)}"
        with suppress(RuntimeError):  # nobody is left to read it
            self._notes.compare_set("error", "", json.dumps([name, text]))

    def _told(self) -> BaseException | None:
        with suppress(RuntimeError):  # the process that keeps the notes is the one that died
            if self._notes.check(["error"]):
                name, text = json.loads(self._notes.get("error"))
                return KeyboardInterrupt() if name == "KeyboardInterrupt" else getattr(errors, name)(text)
        return None

    def _part(self, *, wait: bool) -> None:
        """Close the connections, so that the others hear of the end. Without a launcher, the main process keeps the notes: if
        there is one, it waits for a while until they have read it."""
        with suppress(RuntimeError, ValueError):  # already closed
            dist.destroy_process_group(self._group)
        self._group = None  # whose last holder's end closes them
        with suppress(RuntimeError):
            ended, patience = self._notes.add("ended", 1), time.monotonic() + _LINGER_S
            while wait and self._keeps_notes and ended < self.count and time.monotonic() < patience:
                time.sleep(0.05)
                ended = self._notes.add("ended", 0)

    def _is_first(self) -> bool:
        try:
            return self._notes.add("said", 1) == 1
        except RuntimeError:
            return True


def _leave() -> None:
    """Part from the others in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_lost(error: BaseException) -> bool:
    """Whether an exchange failed, and not what is exchanged."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["unknown reason"])[0]
