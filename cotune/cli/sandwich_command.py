"""`cotune sandwich`: the closed-API way; `redact` shows what would be sent, `restore` puts the values back.

`ask`, `fit` and `script` are in `cotune.cli.sandwich_ask` and `cotune.cli.sandwich_fit`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from cotune.cli.output import print_json, stderr, stdout
from cotune.errors import DataError, InputError

if TYPE_CHECKING:
    from cotune.sandwich.detector_table import DetectorSettings
    from cotune.sandwich.placeholders import Style
    from cotune.sandwich.redact import Redacted, RedactedRequest

_BYTES_PER_CHAR = 4
_MAX_REQUEST_CHARS = 1_000_000
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_MAX_MAP_BYTES = 1 << 28

sandwich = typer.Typer(
    name="sandwich",
    no_args_is_help=True,
    help="A closed cloud API between two private halves: what is private is replaced before it leaves.",
)


@sandwich.command()
def redact(
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    detectors: Annotated[
        str | None,
        typer.Option(
            help="Names with commas: email, phone, iban, card, ip, url, key, dictionary, id, quoted, unlisted, "
            "presidio, gliner. All up to key if left out, dictionary if there is one, the next three with --allow-list."
        ),
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option(help="Your own words, one entry a line, such as `PERSON: Ann Lee | Ann`.")
    ] = None,
    allow_list: Annotated[
        Path | None,
        typer.Option(help="Strict: words that may stay, one a line; all others are replaced. See `allow-list`."),
    ] = None,
    style: Annotated[str, typer.Option(help="typed (<EMAIL_4821>) or surrogate (a made-up address).")] = "typed",
    language: Annotated[str | None, typer.Option(help="For presidio: two letters; en if left out.")] = None,
    gliner_model: Annotated[str | None, typer.Option(help="For gliner: a model folder or hub name.")] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds for each detector; nothing is shown if it takes longer.")
    ] = 5.0,
    max_chars: Annotated[int, typer.Option(help="Longer texts are refused.")] = 1_000_000,
    seed: Annotated[
        int | None, typer.Option(help="Of the placeholders, to get the same twice. Never the same one for two texts.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json-text", help="The text is a JSON document and stays one.")] = False,
    save_map: Annotated[
        Path | None, typer.Option(help="Write what stands for what into this new file, for `restore`. It is private.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append what would be sent to this egress ledger.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print the text that would be sent, and nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; it holds no private value.")] = False,
) -> None:
    """Show what would be sent of FILE: each private value replaced, in colour, and counts. Nothing is sent.

    If a detector fails or takes too long there is no output and the status is 1.

    Examples:

        cotune sandwich redact mail.txt --dictionary my-words.txt

        cotune sandwich redact mail.txt --plain --save-map mail.map > to-send.txt

        cotune sandwich redact - --detectors email,phone,card --json < mail.txt

        cotune sandwich redact mail.txt --dictionary my-words.txt --allow-list common.txt

        cotune sandwich redact mail.txt --detectors email,gliner --gliner-model my-gliner
    """
    from cotune.ledger import EgressLedger
    from cotune.sandwich.redact import Redactor

    if plain and as_json:
        raise InputError("--plain and --json are both given, expected one")
    settings = read_settings(detectors, dictionary, allow_list, language=language, gliner_model=gliner_model)
    text = read_text(file, max_chars)
    generator = None if seed is None else random.Random(seed)
    with Redactor(settings, style=cast("Style", style), timeout_s=timeout, max_chars=max_chars) as redactor:
        request = redactor.request(generator)
        redacted = request.redact_arguments(text) if is_json else request.redact(text)
    if save_map is not None:
        _save_map(request, save_map)
    if ledger is not None:
        with EgressLedger(ledger) as entries:
            redacted.record(entries)
    if as_json:
        rows = [
            {
                "kind": each.kind,
                "start": each.start,
                "end": each.end,
                "sent_start": each.sent_start,
                "sent_end": each.sent_end,
            }
            for each in redacted.replacements
        ]
        counts, num_bytes = redacted.counts, len(redacted.payload)
        print_json({"text": redacted.text, "counts": counts, "bytes": num_bytes, "replacements": rows})
    elif plain:
        sys.stdout.buffer.write(redacted.payload)
        sys.stdout.flush()
    else:
        _show(redacted)


@sandwich.command()
def restore(
    file: Annotated[str, typer.Argument(help="An answer as text, or - for standard input.")],
    saved_map: Annotated[Path, typer.Option("--map", help="The file that `redact --save-map` wrote.")],
    is_json: Annotated[bool, typer.Option("--json-text", help="The answer is a JSON document and stays one.")] = False,
) -> None:
    """Put the private values back into an answer; what stands for nothing known is marked.

    Example:

        cotune sandwich restore answer.txt --map mail.map
    """
    from cotune.sandwich.placeholders import PlaceholderMap
    from cotune.sandwich.redact import MAX_CHARS

    placeholders = PlaceholderMap.from_json(_decode(_read_bytes(saved_map, _MAX_MAP_BYTES), str(saved_map)))
    text = read_text(file, MAX_CHARS)
    sys.stdout.buffer.write(placeholders.restore(text, is_json=is_json).encode("utf-8", "surrogatepass"))
    sys.stdout.flush()


@sandwich.command("allow-list")
def allow_list(
    texts: Annotated[str, typer.Argument(help="Texts of others than you, any template of docs/data.md.")],
    out: Annotated[Path, typer.Option(help="A new file: one word a line.")],
    min_texts: Annotated[int, typer.Option(help="In how many texts a word must stand; more make a shorter list.")] = 5,
    limit: Annotated[int | None, typer.Option(help="Texts at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the words that many texts use in small letters: what may stay where everything else is replaced.

    Read the list before you use it, and take texts that have nothing to do with you.

    Example:

        cotune sandwich allow-list public-dialogues.jsonl --min-texts 10 --out common.txt
    """
    from cotune.data import read_examples
    from cotune.durable import write_new
    from cotune.sandwich.detectors.unlisted import learn_common_words

    examples = read_examples(texts, limit=limit)
    words = learn_common_words((f"{each.prompt}\n{each.target}" for each in examples), min_texts=min_texts)
    if not words:
        raise InputError(f"no word stands in {min_texts} of {len(examples):,} texts; lower --min-texts, or take more")
    try:
        write_new(out, "".join(f"{word}\n" for word in words).encode())
    except FileExistsError:
        raise InputError(f"{out} is there already, expected a new file for --out; choose another") from None
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; choose another file") from None
    if as_json:
        print_json({"words": len(words), "texts": len(examples)})
    else:
        stdout.print(f"{len(words):,} words of {len(examples):,} texts", markup=False)


def read_settings(
    detectors: str | None,
    dictionary: Path | None,
    allow_list: Path | None = None,
    *,
    language: str | None = None,
    gliner_model: str | None = None,
) -> DetectorSettings:
    """Which detectors look, with the user's dictionary and the words that may stay.

    Raises:
        InputError: a file cannot be read, or has no entry.
    """
    from cotune.sandwich.detector_table import DetectorSettings
    from cotune.sandwich.detectors.dictionary import parse_dictionary

    entries = []
    if dictionary is not None:
        entries = parse_dictionary(_decode(_read_bytes(dictionary, 1 << 24), str(dictionary)))
        if not entries:
            raise DataError(
                "the dictionary has no entry, expected one a line, such as PERSON: Ann Lee", path=dictionary
            )
    words: tuple[str, ...] = ()
    if allow_list is not None:
        words = tuple(_decode(_read_bytes(allow_list, 1 << 24), str(allow_list)).split())
        if not words:
            raise DataError("the allow list has no word, expected one a line", path=allow_list)
    return DetectorSettings(
        detectors=None if detectors is None else tuple(name.strip() for name in detectors.split(",") if name.strip()),
        dictionary=tuple(entries),
        allow_list=words,
        presidio_language=language,
        gliner_model=gliner_model,
    )


def read_text(file: str, max_chars: int = _MAX_REQUEST_CHARS) -> str:
    """A text file, or standard input for -, no longer than that.

    Raises:
        InputError: it cannot be read, is longer, or is no UTF-8.
    """
    limit = max_chars * _BYTES_PER_CHAR
    if file == "-":
        data = sys.stdin.buffer.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"standard input has more than {limit} bytes, expected at most that; see --max-chars")
        return _decode(data, "standard input")
    return _decode(_read_bytes(Path(file), limit), file)


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as opened:
            data = opened.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    if len(data) > limit:
        raise DataError(f"has more than {limit} bytes, expected at most that; shorten it", path=path)
    return data


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 at byte {error.start}; convert it first") from None


def _save_map(request: RedactedRequest, path: Path) -> None:
    from cotune.durable import write_new

    try:
        write_new(path, request.placeholders.to_json().encode("ascii"))
    except FileExistsError:
        raise InputError(f"{path} is there already, expected a new file for --save-map; choose another") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another file") from None


def _show(redacted: Redacted) -> None:
    """What would be sent, placeholders in the colour of their kind; counts on standard error."""
    kinds = list(redacted.counts)
    text = redacted.text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")  # a text does not command the terminal
    shown, end = Text(), 0
    for each in redacted.replacements:
        colour = _COLOURS[kinds.index(each.kind) % len(_COLOURS)]
        shown.append(text[end : each.sent_start]).append(text[each.sent_start : each.sent_end], f"bold {colour}")
        end = each.sent_end
    shown.append(text[end:])
    if text.endswith("\n"):
        shown.right_crop(1)
    stdout.print(shown, soft_wrap=True)
    stderr.print(f"would be sent: {len(redacted.payload):,} bytes")
    table = Table("kind", "replaced")
    table.columns[1].justify = "right"
    for index, (kind, count) in enumerate(redacted.counts.items()):
        table.add_row(Text(kind, style=_COLOURS[index % len(_COLOURS)]), f"{count:,}")
    if not kinds:
        table.add_row("nothing found", "0")
    stderr.print(table)
