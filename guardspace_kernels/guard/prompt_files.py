"""Prompts from files as people have them: lines of text, JSON Lines, JSON, and tables with a named column."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from guardspace_kernels.arguments import instance, readable_file, shown

#: A text, or a conversation: messages such as ``{"role": "user", "content": "..."}``.
Prompt = str | list[dict[str, Any]]

PROMPT_FILES = ".txt (a prompt per line), .jsonl, .json, .csv or .tsv"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_DEFAULTS = ("prompt", "messages")


def read_prompts(path: str | os.PathLike[str], column: str | None = None) -> list[Prompt]:
    """The prompts of a file, in order; what the file holds is told by the end of its name.

    * ``.txt``, or no ending: one prompt per line; empty lines do not count. Lines end with a line feed, or carriage
      return and line feed, and with nothing else that Unicode calls a line break.
    * ``.jsonl`` or ``.ndjson``: a JSON object, or a text, per line. ``.json``: a list of them.
    * ``.csv`` or ``.tsv``: a table with a header.

    The encoding is UTF-8, or what a byte order mark says (UTF-8 or UTF-16).

    Args:
        path: of the file.
        column: the field or column that holds the prompts, such as "goal". Default "prompt", or "messages" in objects
            that have no "prompt". A field may hold a conversation, a list of messages with "role" and "content".

    Raises:
        FileNotFoundError: there is no such file. TypeError, ValueError: a file of another kind or encoding, a line that
            is no prompt, a column that does not exist, or no prompt at all; the message names the place.
    """
    path = readable_file("path", path, PROMPT_FILES)
    if column is not None:
        instance("column", column, str, "a text")
    ending = os.path.splitext(path)[1].lower()
    rows = _READERS.get(ending)
    if rows is None:
        raise ValueError(f"path: {path} is not a file that prompts are read from: {PROMPT_FILES}; convert or rename it")
    if column is not None and rows is _lines:
        raise ValueError(f"column is {column!r}, but {path} is plain text, a prompt per line, and has no columns")
    with open(path, "rb") as file:
        text = _decoded(path, file.read())
    prompts = [_prompt(row, where, column) for where, row in rows(path, text)]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _decoded(path: str, data: bytes) -> str:
    mark, encoding = next((m for m in _MARKS if data.startswith(m[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = data[len(mark) : len(mark) + error.start].decode(encoding)
        raise ValueError(
            f"{path}, line {before.count(chr(10)) + 1}, byte {len(mark) + error.start}: not {encoding.upper()} "
            f"({error.reason}); save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a zero byte: a binary file, or UTF-16 or "
            "UTF-32 without its mark; save it as UTF-8 text"
        )
    return text


def _lines(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(where, line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        where, line = f"{path}, line {number}", line.removesuffix("\r")
        if "\r" in line:
            raise ValueError(f"{where}: a carriage return without a line feed; end lines with a line feed")
        if line.startswith("\ufeff"):
            raise ValueError(f"{where} begins with a byte order mark, as files do that were joined; remove it")
        if line.strip():
            yield where, line


def _json_lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path, text):
        yield where, _parsed(line, f"{where}: expected one JSON object per line")


def _json_list(path: str, text: str) -> Iterator[tuple[str, Any]]:
    whole = _parsed(text, f"{path}: expected one JSON list (a file with an object per line is called .jsonl)")
    if not isinstance(whole, list):
        raise ValueError(f"{path}: expected a JSON list of texts or objects, got {shown(whole)}")
    for number, row in enumerate(whole, 1):
        yield f"{path}, entry {number}", row


def _parsed(text: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}, got what is no JSON: {error}") from error


def _table(path: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    # The line breaks within quotes are the reader's affair.
    rows = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True
    )
    header: list[str] = []
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not row:
                continue
            if not header:
                header = row
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise ValueError(f"{where}: the header names column {twice[0]!r} twice")
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} fields, but the header has {len(header)}: {', '.join(header)}; put quotes "
                    "around texts that hold the separator"
                )
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not a table: {error}") from error


_READERS = {
    "": _lines,
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}


def _prompt(row: Any, where: str, column: str | None) -> Prompt:
    if isinstance(row, Mapping):
        names = _DEFAULTS if column is None else (column,)
        found = next((name for name in names if name in row), None)
        if found is None:
            wanted = " or ".join(repr(name) for name in names)
            raise ValueError(f"{where}: no column {wanted}; there are {_listed(row)}: name one as column")
        where, row = f"{where}: {found!r}", row[found]
    elif column is not None or not isinstance(row, str):
        raise ValueError(f"{where}: expected an object with a field {column or 'prompt'!r}, got {shown(row)}")
    return checked_prompt(row, where)


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(shown(name) for name in row) or "none"


def checked_prompt(prompt: Any, where: str) -> Prompt:
    """ValueError unless it is a text or a conversation of texts, none of them empty."""
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
                raise ValueError(f'{where}: expected messages with "role" and "content", got {shown(message)}')
            for text in texts_of(message, where):
                _check_text(text, where)
        if not any(message["role"] == "user" for message in prompt):
            raise ValueError(f"{where}: no message is the user's, so that there is no request")
        return [dict(message) for message in prompt]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: expected a text that is not empty, or a list of messages, got {shown(prompt)}")
    _check_text(prompt, where)
    return prompt


def texts_of(message: Mapping[str, Any], where: str) -> list[str]:
    """What a message says; ValueError if it is not text alone."""
    content = message["content"]
    if content is None and message["role"] == "assistant":  # it calls a tool
        return []
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(
                f'{where}: expected as "content" a text or parts {{"type": "text", "text": ...}}, got {shown(part)}; '
                "images and sounds are not collected"
            )
    return [part["text"] for part in parts]


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half of a surrogate pair at character {error.start}; no tokenizer takes it"
        ) from error
