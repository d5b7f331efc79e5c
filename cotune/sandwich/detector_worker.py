"""The detectors' process: reads passages from standard input and answers with findings on standard output.

Messages are a length of four bytes, big-endian, and JSON. The first is the settings; the answer names the detectors or
says why there are none. Each further one is a list of passages, answered once for each detector. When its input ends,
the process ends; when a detector takes longer than its time, so does the process, even if nobody is left to stop it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import struct
import sys
from pathlib import Path
from typing import IO, Any

from cotune.errors import InputError
from cotune.sandwich.detect import FoldedPassage, Passage, detect
from cotune.sandwich.detector_table import DetectorSettings, build_detector
from cotune.sandwich.finding import Detector

_LENGTH = struct.Struct(">I")
MAX_MESSAGE_BYTES = 1 << 30


def read_message(stream: IO[bytes]) -> Any:
    """The next message; None at the end."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_MESSAGE_BYTES:
        return None
    body = stream.read(length)
    return json.loads(body) if len(body) == length else None


def write_message(stream: IO[bytes], message: Any) -> None:
    """Send one message."""
    body = json.dumps(message).encode("ascii")
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def serve(requests: IO[bytes], answers: IO[bytes], silence: Any) -> None:
    """Answer until the requests end."""
    opening = read_message(requests)
    if opening is None:
        return
    try:
        detectors = _build(DetectorSettings.from_json(opening["settings"]))
    except InputError as error:  # its message is ours, and tells of settings alone
        write_message(answers, {"refused": str(error)})
        return
    except Exception as error:
        write_message(answers, {"refused": f"the detectors could not be made: {type(error).__name__}"})
        return
    write_message(answers, {"ready": list(detectors)})
    while (request := read_message(requests)) is not None:
        faulthandler.dump_traceback_later(opening["last_resort_s"], exit=True, file=silence)
        passages = [FoldedPassage.of(Passage(*each)) for each in request["passages"]]
        for detector in detectors.values():
            faulthandler.dump_traceback_later(opening["last_resort_s"], exit=True, file=silence)
            answer = _answer(detector, passages)
            faulthandler.cancel_dump_traceback_later()
            write_message(answers, answer)


def _build(settings: DetectorSettings) -> dict[str, Detector]:
    return {name: build_detector(name, settings) for name in settings.names}


def _answer(detector: Detector, passages: list[FoldedPassage]) -> dict[str, Any]:
    try:
        found = [detect(detector, passage) for passage in passages]
        return {"found": [[[f.start, f.end, f.kind, f.identity] for f in each] for each in found]}
    except Exception as error:
        return {"failed": type(error).__name__}


def main() -> None:
    """Serve this process's pipes. What detectors print goes nowhere: it may hold private values."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with Path(os.devnull).open("w", encoding="utf-8") as silence:
        os.dup2(silence.fileno(), sys.stdout.fileno())
        os.dup2(silence.fileno(), sys.stderr.fileno())
        serve(sys.stdin.buffer, answers, silence)


if __name__ == "__main__":
    main()
