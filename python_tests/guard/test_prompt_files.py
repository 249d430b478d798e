"""Prompt files as people have them: every kind gives the same prompts, and what is none is refused by its place."""

import json

import pytest

from guardspace_kernels.guard.prompt_files import read_prompts

# Line separators, vertical tabs and next lines are characters like others, within a prompt.
PROMPTS = ["how are\u2028you", "one\x0btwo\x0cthree", "a\x85b\u2029c \x1c d", 'a "quoted", one', "grüße 你好"]
ROWS = [{"id": str(i), "goal": p, "target": "Sure, here"} for i, p in enumerate(PROMPTS)]
TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def quoted(field):
    return '"' + field.replace('"', '""') + '"'


def table(rows, separator=",", end="\n"):
    lines = [separator.join(rows[0]), *(separator.join(map(quoted, row.values())) for row in rows)]
    return end.join(lines) + end


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, encoding, end):
    mark = "\ufeff" if encoding == "utf-16-be-mark" else ""
    encoding = encoding.removesuffix("-mark")
    texts = {
        "a.txt": (end.join(PROMPTS) + end + end + " " + end, None),
        "a": (end.join(PROMPTS), None),
        "a.JSONL": (end.join(json.dumps(row, ensure_ascii=False) for row in ROWS), "goal"),
        "b.jsonl": (end.join(json.dumps({"prompt": p}) for p in PROMPTS) + end, None),
        "c.ndjson": (end.join(json.dumps(p) for p in PROMPTS) + end, None),
        "a.json": (json.dumps(ROWS, indent=2), "goal"),
        "b.json": (json.dumps(PROMPTS), None),
        "a.csv": (table(ROWS, end=end), "goal"),
        "b.csv": (table([{"prompt": p} for p in PROMPTS], end=end), None),
        "a.tsv": (table(ROWS, "\t", end=end), "goal"),
    }
    for name, (text, column) in texts.items():
        assert read_prompts(write(tmp_path / name, mark + text, encoding), column) == PROMPTS, name


def test_a_table_may_break_lines_within_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,kind\n"first\nsecond\r\nthird",x\n\n"next",y\n')
    assert read_prompts(path) == ["first\nsecond\r\nthird", "next"]


def test_conversations_stay_as_they_are(tmp_path):
    lines = [{"messages": TALK, "id": 1}, {"prompt": "p", "messages": TALK}, {"prompt": TALK}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_prompts(path) == [TALK, "p", TALK]
    assert read_prompts(write(tmp_path / "a.json", json.dumps([{"talk": TALK}])), "talk") == [TALK]


@pytest.mark.parametrize(
    "name, text, column, words",
    [
        ("a.parquet", "PAR1", None, "is not a file that prompts are read from: .txt"),
        ("a.xlsx", "PK", None, "a.xlsx is not a file that prompts are read from"),
        ("a.jsonl.gz", "x", None, "a.jsonl.gz is not a file"),
        ("a.txt", "one\ntwo\0", None, "line 2: a zero byte: a binary file"),
        ("a.txt", "one\rtwo\n", None, "line 1: a carriage return without a line feed"),
        ("a.txt", "one\n\ufefftwo", None, "line 2 begins with a byte order mark"),
        ("a.txt", " \n\n", None, "holds no prompt"),
        ("a.txt", "one", "goal", "column is 'goal', but .* is plain text"),
        ("a.jsonl", '{"prompt": "a"}\n{', None, "line 2: expected one JSON object per line, got what is no JSON"),
        ("a.jsonl", json.dumps(ROWS, indent=1), None, "line 1: expected one JSON object per line"),
        (
            "a.jsonl",
            '{"goal": "a", "target": "b"}',
            None,
            "no column 'prompt' or 'messages'; there are 'goal', 'target'",
        ),
        ("a.jsonl", '{"goal": "a"}', "Goal", "no column 'Goal'; there are 'goal'"),
        ("a.jsonl", '{"prompt": 3}', None, "line 1: 'prompt': expected a text that is not empty, or a list .* got 3"),
        ("a.jsonl", '{"prompt": ""}', None, "line 1: 'prompt': expected a text that is not empty"),
        ("a.jsonl", '{"prompt": null}', None, "got None"),
        ("a.jsonl", '"one"', "goal", "expected an object with a field 'goal', got 'one'"),
        ("a.jsonl", '{"messages": []}', None, "'messages': expected a text that is not empty, or a list of messages"),
        ("a.jsonl", '{"messages": ["hi"]}', None, 'expected messages with "role" and "content", got \'hi\''),
        ("a.jsonl", '{"messages": [{"from": "human", "value": "hi"}]}', None, 'expected messages with "role"'),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', None, "no message is the user's"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', None, "images and sounds"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', None, 'as "content" a text or parts'),
        ("a.jsonl", '{"prompt": "\\ud800"}', None, "half of a surrogate pair at character 0"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, None, "line 1: expected one JSON object per line"),
        ("a.json", '{"goal": ["a"]}', None, "expected a JSON list of texts or objects, got {'goal'"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', None, "a file with an object per line is called .jsonl"),
        ("a.json", "[1]", None, "entry 1: expected an object with a field 'prompt', got 1"),
        ("a.json", "[]", None, "holds no prompt"),
        ("a.json", "[" * 100_000, None, "got what is no JSON"),
        ("a.csv", table(ROWS), None, "line 2: no column 'prompt' or 'messages'; there are 'id', 'goal', 'target'"),
        (
            "a.csv",
            table(ROWS),
            "Behavior",
            "no column 'Behavior'; there are 'id', 'goal', 'target': name one as column",
        ),
        ("a.csv", "prompt\nwell, then\n", None, r"line 2: 2 fields, but the header has 1: prompt; put quotes"),
        ("a.csv", "prompt,b\nx\n", None, r"line 2: 1 fields, but the header has 2"),
        ("a.csv", "prompt,prompt\nx,y\n", None, "line 1: the header names column 'prompt' twice"),
        ("a.csv", 'prompt\n"open\n', None, "not a table: unexpected end of data"),
        ("a.csv", "prompt,b\n ,y\n", None, "line 2: 'prompt': expected a text that is not empty"),
        ("a.csv", "prompt\n", None, "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(tmp_path, name, text, column, words):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=words) as refused:
        read_prompts(path, column)
    assert str(path) in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "data, words",
    [
        (b"one\ncaf\xe9\n", "line 2, byte 7: not UTF-8 .*; save the file as UTF-8"),
        ("one\ntwo".encode("utf-16")[:-1], "line 2, byte 14: not UTF-16-LE"),
        ("one".encode("utf-16-le"), "line 1: a zero byte: a binary file, or UTF-16 or UTF-32 without its mark"),
        ("one".encode("utf-32"), "line 1: a zero byte"),
        (b"\xef\xbb\xbfone\n\xff", "line 2, byte 7: not UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_the_position(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / "a.txt")


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=f"path: {tmp_path} is a folder; give a file: .txt"):
        read_prompts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path: .*none\.txt does not exist; expected a file: .txt"):
        read_prompts(tmp_path / "none.txt")
