"""Files and values that a user may hand over: none hangs, fills the memory or leaves a traceback, and messages are one
line."""

import json
import os
import re
from io import BufferedReader, FileIO

import pytest

from ssl_dist import config
from ssl_dist.config.section import MAX_CHARACTERS, MAX_DEPTH, parse_yaml, read_yaml
from ssl_dist.errors import MAX_MESSAGE, MAX_QUOTED, Fault, UserError, one_line, quoted
from ssl_dist.reading import json_lines, parse_json, read_bytes, read_text
from ssl_dist.run import metrics
from tests.messages import naming


def bomb(levels, fan):
    """`fan` to the power of `levels` values, by aliases; the last is named by *a<levels - 1>."""
    lines = [f"a0: &a0 [{', '.join(['1'] * fan)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * fan)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


REFUSED = {  # and words of the line
    "a: " + "1" * 5000: ["line 1", "whole number", "write one"],
    "a: " + "1" * 31: ["line 1", "whole number"],
    "\na: 0x_": ["line 2", "'0x_'", "write one"],
    "a: 0b_": ["'0b_'"],
    "a: !!int x": ["'x'", "whole number"],
    "a: !!float x": ["'x'", "number"],
    "a: !!bool x": ["'x'", "true or false"],
    "a: !!null x": ["'x'", "null"],
    "a: " + ":".join(["59"] * 400) + ".5": ["number"],
    "a: !!int [1]": ["tag", "!!int"],
    "a: !!map x": ["tag", "!!map", "plain value"],
    "a: !!set {x}": ["tag", "!!set"],
    "a: !!binary x": ["tag", "!!binary"],
    "a: !mine x": ["tag", "!mine"],
    'a: "x\\0y"': ["NUL", "remove"],
    'a: "x\\ud800y"': ["half a character", "write it whole"],
    "a: " + "[" * 5000 + "]" * 5000: [f"deeper than {MAX_DEPTH}"],
    "\n".join(" " * n + "a:" for n in range(300)): [f"deeper than {MAX_DEPTH}", f"line {MAX_DEPTH}"],
    bomb(9, 9): ["line 5", "values", "write fewer"],
    bomb(9, 9) + "? *a8\n: 1\n": ["values"],
    bomb(2000, 1): ["deeper", "aliases"],
    "a: &a [*a]": ["alias inside"],
    "a: " + "x" * MAX_CHARACTERS: [f"{MAX_CHARACTERS:,}"],
    '"a\\nb": 1\n"a\\nb": 2\n': ["'a\\nb' stands twice"],
    "a: *" + "q" * 9000: ["undefined alias"],
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20].strip())
def test_yaml_that_is_refused_in_one_line(text):
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "config.yaml")
    message = str(raised.value)
    assert message.startswith("config.yaml: ") and message.isprintable() and len(message) <= MAX_MESSAGE
    for word in REFUSED[text]:
        assert word in message


def test_yaml_that_is_read():
    assert parse_yaml("a: !!float 5\nb: !!str 5\nc: 1_000\nd: 0x1f\ne: 1e-3\n", "F") == {
        "a": 5.0, "b": "5", "c": 1000, "d": 31, "e": 0.001,
    }  # fmt: skip
    assert parse_yaml("[2024-02-21, 2024-02-31]", "F") == ["2024-02-21", "2024-02-31"]
    assert parse_yaml("\ufeffa: &x [1, 2]\nb: *x\n", "F") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "F") is not None


def test_a_config_that_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, reason in ((tmp_path / "pipe.yaml", "not a regular file"), ("/dev/zero", "not a regular file")):
        with pytest.raises(UserError, match=naming(path, "cannot be read", reason, "configs/")):
            config.load(path)
    (tmp_path / "long.yaml").write_text("#" * 10**6)
    with pytest.raises(UserError, match=naming("long.yaml", "more than", "bytes", "remedy")):
        read_yaml(tmp_path / "long.yaml", str(tmp_path / "long.yaml"), "remedy")


@pytest.mark.parametrize("key", ["views.num", "views.groups.0.num"])
def test_numbers_of_views_that_no_memory_holds_are_refused(key):
    with pytest.raises(UserError, match=naming(key, "1000000000", "4096")):
        config.load("configs/digits/relational-conv4.yaml", ["views.num=null", f"{key}=1000000000"])
    with pytest.raises(UserError, match=naming("views.groups", "8192", "4096")):
        config.load(
            "configs/digits/relational-conv4.yaml",
            ["views.num=null", "views.groups=[{num: 4096, size: 8}, {num: 4096, size: 8}]"],
        )


@pytest.mark.parametrize("override", ["seed=" + "x" * 90_000, '={"a\\nb": 1}', "optim={" + "x" * 9000 + ": 1}"])
def test_long_values_and_keys_are_shortened(override):
    with pytest.raises(UserError) as raised:
        config.load("configs/digits/relational-conv4.yaml", [override])
    assert len(str(raised.value)) <= MAX_MESSAGE and str(raised.value).isprintable()


def test_a_message_is_one_line_and_keeps_its_ends():
    for kind in (UserError, Fault):
        message = str(kind("key\n\x1b[2J\udce9: " + "é" * 10**6 + "; the remedy"))
        assert message.isprintable() and len(message) <= MAX_MESSAGE
        assert message.startswith("key\\n\\x1b[2J\\udce9: é") and message.endswith("é; the remedy")
    assert one_line("short") == "short" and quoted("a\nb") == "'a\\nb'" and quoted(None) == "None"
    shown = quoted("begin" + "x" * 10**7 + "end")
    assert len(shown) == MAX_QUOTED and shown.startswith("'begin") and shown.endswith("end'")


def test_json_that_is_read():
    assert parse_json('{"a": 1%s, "b": "\\ud800 \\u00e9", "c": NaN}' % ("0" * 400))["b"] == "? é"
    assert parse_json("1" + "0" * 400) == float("inf")
    for text in ("[" * 10**5 + "]" * 10**5, "{", "", '"', "[1,]"):
        with pytest.raises(ValueError):
            parse_json(text)


def test_lines_of_json_that_is_damaged(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert json_lines(path, lambda line: True) == ([], [])
    good = [{"step": 1}, {"step": 2}]
    lines = [json.dumps(good[0]), "[1]", "5", "", "\xff", '{"step": ', "[" * 10**5, json.dumps(good[1])]
    path.write_bytes("\n".join(lines).encode("latin-1") + b'\n{"step": 3')
    assert json_lines(path, lambda line: "step" in line) == (good, [2, 3, 4, 5, 6, 7])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=re.escape(str(path))):
        json_lines(path, lambda line: True)
    with pytest.raises(OSError, match="not a regular file"):
        read_text(path)


def test_lines_of_a_file_that_is_too_large_are_not_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(read_bytes, "__defaults__", (1000,))
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n' * 83, encoding="utf-8")
    assert len(json_lines(path, lambda line: True)[0]) == 83
    path.write_text('{"step": 1}\n' * 84, encoding="utf-8")
    for read in (lambda: json_lines(path, lambda line: True), lambda: metrics.cut_after(path, 0)):
        with pytest.raises(OSError, match=rf"more than 1,000 bytes: '{re.escape(str(path))}'"):
            read()
    assert path.stat().st_size == 1008


def test_a_small_file_takes_little_memory(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n' * 200_000, encoding="utf-8")
    asked = []
    read, fdopen = BufferedReader.read, os.fdopen

    class Reader(BufferedReader):
        def read(self, size=-1, /):
            asked.append(size)
            return read(self, size)

    monkeypatch.setattr(os, "fdopen", lambda fd, mode: Reader(FileIO(fd, mode)) if mode == "rb" else fdopen(fd, mode))
    assert len(json_lines(path, lambda line: True)[0]) == 200_000
    assert len(read_text(path)) == path.stat().st_size
    metrics.cut_after(path, 0)
    assert path.read_text(encoding="utf-8") == ""
    assert 0 < max(asked) <= 1 << 20 and min(asked) > 0  # a rank's heap would hold what was once asked for
