"""Detectors in a process of their own, stopped when they take too long: the gate that fails closed.

A thread cannot be stopped, and Python's regular expressions let no other thread run while they match. A process can
be killed whatever it does. It is started once and kept; a detector that fails or takes too long costs that process,
and the next request starts another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from cotune.errors import InputError, RedactionError
from cotune.sandwich.detect import Passage, check_findings, failed_detector
from cotune.sandwich.detector_table import DetectorSettings
from cotune.sandwich.detector_worker import read_message, write_message
from cotune.sandwich.finding import Finding


class DetectorProcess:
    """A `Finder` whose every detector has a hard time limit. May be used by several threads, one at a time.

    Args:
        settings: which detectors.
        timeout_s: for each detector, for all passages of a request together.
        start_timeout_s: for starting the process and loading its models.

    Raises:
        InputError: a time that is not above 0.

    Example:
        >>> with DetectorProcess(DetectorSettings()) as finder:
        ...     finder.find([Passage("ann@x.org")])
        [[Finding(start=0, end=9, kind='EMAIL')]]
    """

    def __init__(self, settings: DetectorSettings, *, timeout_s: float = 5.0, start_timeout_s: float = 120.0) -> None:
        for name, value in (("timeout_s", timeout_s), ("start_timeout_s", start_timeout_s)):
            if not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}, expected a number of seconds above 0")
        self._settings = settings
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], DetectorProcess] | None = None

    def find(self, passages: Sequence[Passage]) -> list[list[Finding]]:
        """See `Finder`.

        Raises:
            InputError: the process cannot make a detector, such as one whose package is missing.
            RedactionError: a detector failed or took too long.
        """
        with self._lock:
            try:
                return self._find(passages)
            except BaseException:
                # Whatever it is in the middle of, its next answer could be one to this request.
                self._end()
                raise

    def _find(self, passages: Sequence[Passage]) -> list[list[Finding]]:
        process = self._started()
        names = self._settings.names
        request = {"passages": [[each.text, each.context, each.is_json] for each in passages]}
        found: list[list[Finding]] = [[] for _ in passages]
        for index, name in enumerate(names):
            with self._limit(process, self._timeout_s, name):
                answer = _exchange(process, request if index == 0 else None)
            if "found" not in answer:
                raise failed_detector(name, str(answer.get("failed", "no answer")))
            for passage, findings, triples in zip(passages, found, answer["found"], strict=True):
                fresh = [Finding(*triple) for triple in triples]
                check_findings(name, fresh, passage)
                findings.extend(fresh)
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        # The worker finds the same packages, also those of a caller that has changed its path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "cotune.sandwich.detector_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise RedactionError(
                f"the detectors' process cannot be started: {error.strerror}; nothing is sent"
            ) from None
        self._process = process
        self._stop = weakref.finalize(self, _kill, process)
        opening = {"settings": self._settings.as_json(), "last_resort_s": 2 * self._timeout_s + 1}
        with self._limit(process, self._start_timeout_s, None):
            answer = _exchange(process, opening)
        if "refused" in answer:
            raise InputError(str(answer["refused"]))
        return process

    @contextmanager
    def _limit(self, process: subprocess.Popen[bytes], seconds: float, detector: str | None) -> Iterator[None]:
        """Kill the process after so many seconds, which ends the exchange that waits for it."""
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        who = "starting the detectors" if detector is None else f"the detector {detector}"
        try:
            yield
        except (OSError, EOFError, ValueError):
            reason = f"took longer than {seconds:g} s" if expired.is_set() else "ended without an answer"
            raise RedactionError(
                f"{who} {reason}, so nothing is sent; shorten the text or give it more time", detector=detector
            ) from None
        finally:
            timer.cancel()

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def close(self) -> None:
        """End the process. The next `find` starts another."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _exchange(process: subprocess.Popen[bytes], message: Any) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    if message is not None:
        write_message(process.stdin, message)
    answer = read_message(process.stdout)
    if not isinstance(answer, dict):
        raise EOFError
    return answer


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not written when it died
                continue
