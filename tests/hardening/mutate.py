"""Damage files: a generator of random numbers and the bytes of a file give the bytes of a hostile file.

Each function is pure, so that a seed names a case for ever. A mutation says why another answer would be right: a
picture whose pixels changed is another picture, but a picture that was cut short is none.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = [
    "ESCAPE",
    "PLANTED_PATHS",
    "Mutation",
    "clip",
    "gguf",
    "image",
    "json_file",
    "lines",
    "safetensors",
    "torch_file",
]
__all__ += ["yaml_file"]

#: Sets the title of a terminal's window. No honest output has it.
ESCAPE = "\x1b]0;owned\x07"
#: Files that a hostile file names, and that no command has a reason to open.
PLANTED_PATHS = ("/dev/zero", "/etc/passwd", "../../../../../../etc/passwd")
#: An address that a hostile file names. Nothing listens there.
PLANTED_URL = "http://127.0.0.1:9/planted"


@dataclass(frozen=True)
class Mutation:
    """Bytes of a hostile file.

    Attributes:
        how: what was done, for the report of a failure.
        data: the bytes.
        another_answer: why an answer that differs from that to the whole file is right; empty if none is.
    """

    how: str
    data: bytes
    another_answer: str = ""


# -- any bytes ---------------------------------------------------------------------------------------------------------


def truncated(rng: random.Random, data: bytes) -> Mutation:
    end = rng.choice([0, 1, len(data) - 1, len(data) // 2, rng.randrange(len(data))])
    return Mutation(f"first {end} of {len(data)} bytes", data[:end])


def flipped(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> Mutation:
    """Change 1 to 8 bytes between `start` and `end`."""
    changed = bytearray(data)
    places = sorted(rng.randrange(start, min(end or len(data), len(data))) for _ in range(rng.choice([1, 1, 2, 8])))
    for place in places:
        changed[place] ^= rng.randrange(1, 256)
    return Mutation(f"bytes {places} changed", bytes(changed))


def spliced(rng: random.Random, data: bytes) -> Mutation:
    """Remove, repeat or overwrite a block."""
    start = rng.randrange(len(data))
    size = rng.choice([1, 4, 64, 1024])
    block = data[start : start + size]
    new = {"removed": b"", "repeated": block * 2, "zeroed": bytes(len(block)), "noise": rng.randbytes(len(block))}
    how = rng.choice(sorted(new))
    return Mutation(f"{len(block)} bytes at {start} {how}", data[:start] + new[how] + data[start + size :])


# -- images ------------------------------------------------------------------------------------------------------------


def _promising(rng: random.Random, data: bytes) -> Mutation:
    """Make a header promise a huge picture."""
    side = rng.choice([0, 30_000, 65_535, 2**31 - 1])
    if data.startswith(b"\x89PNG"):
        header = data[12:16] + side.to_bytes(4, "big") * 2 + data[24:29]
        changed = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    elif data.startswith(b"GIF"):
        changed = data[:6] + min(side, 65_535).to_bytes(2, "little") * 2 + data[10:]
    elif data.startswith(b"BM"):
        changed = data[:18] + side.to_bytes(4, "little") * 2 + data[26:]
    else:
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"), 0)
        changed = data[: at + 5] + min(side, 65_535).to_bytes(2, "big") * 2 + data[at + 9 :]
    return Mutation(f"a header of {side} by {side} pixels", changed, "a decoder may find the pixels that there are")


def image(rng: random.Random, data: bytes) -> Mutation:
    """Damage an encoded image."""
    how = rng.choice([truncated, truncated, flipped, spliced, _promising, _head, _other_kind])
    found = how(rng, data)
    if how in (truncated, _promising):
        return found
    return Mutation(found.how, found.data, "other bytes are another picture")


def clip(rng: random.Random, data: bytes) -> Mutation:
    """Damage an encoded clip, or put a list of other files in its place."""
    how = rng.choice([truncated, truncated, flipped, spliced, _clip_head, _playlist])
    found = how(rng, data)
    return found if how in (truncated, _playlist) else Mutation(found.how, found.data, "other bytes are another clip")


def _clip_head(rng: random.Random, data: bytes) -> Mutation:
    return flipped(rng, data, 0, 600)


def _playlist(rng: random.Random, data: bytes) -> Mutation:
    """Put a file in the clip's place that makes FFmpeg open another file or an address."""
    other = rng.choice([*PLANTED_PATHS, PLANTED_URL])
    kinds = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{other}'\n",
        f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{other}</BaseURL></MPD>",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{other}\n",
    ]
    return Mutation(f"a list that names {other}", rng.choice(kinds).encode())


def _head(rng: random.Random, data: bytes) -> Mutation:
    return flipped(rng, data, 0, 64)


def _other_kind(rng: random.Random, data: bytes) -> Mutation:
    """Put a file of another kind where the image should be."""
    kinds = [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9999999' height='9999999'><image href='/etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n",
        b"root:x:0:0:root:/root:/bin/bash\n",
        ESCAPE.encode() * 3,
        b"\x89PNG\r\n\x1a\n" + rng.randbytes(200),
        b"\xff\xd8\xff\xe0" + rng.randbytes(200),
    ]
    return Mutation("a file of another kind", rng.choice(kinds))


# -- JSON and YAML -----------------------------------------------------------------------------------------------------

#: Values that a key of a configuration should not hold.
WRONG: list[Any] = [
    None,
    [],
    {},
    "",
    "text",
    True,
    -1,
    0,
    1,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**30,
    [[]],
    [None],
    {"": {}},
    ESCAPE,
    "\x1b[31m red",
    "x" * 100_000,
    "<script>alert(1)</script>",
    *PLANTED_PATHS,
    PLANTED_URL,
]


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a tree, except those of a vocabulary's thousand entries."""
    keys: Sequence[Any] = ()
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = range(len(tree))
    keys = list(keys)[:40]
    return [place for key in keys for place in [(*path, key), *_places(tree[key], (*path, key))]]


def _holder(tree: Any, path: Sequence[Any]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def change_tree(rng: random.Random, tree: Any) -> tuple[str, Any]:
    """Delete a key, give it a wrong value or another name, or add one; say what was done."""
    changed = copy.deepcopy(tree)
    places = _places(changed)
    if not places:
        return "a value of the wrong kind", rng.choice(WRONG)
    # Top-level keys are as likely as all others, which would drown them.
    path = rng.choice([place for place in places if len(place) == 1] if rng.random() < 0.4 else places)
    holder, key = _holder(changed, path), path[-1]
    name = ".".join(map(str, path))
    how = rng.choice(["delete", "wrong", "wrong", "scale", "rename", "add", "swap"])
    if how == "scale" and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([-holder[key], holder[key] + 1, holder[key] * 2, holder[key] * 10**9, holder[key] / 3])
        return f"{name} = {holder[key]!r}", changed
    if how == "delete":
        del holder[key]
        return f"{name} deleted", changed
    if how == "rename" and isinstance(holder, dict):
        holder[f"{key}{ESCAPE}"] = holder.pop(key)
        return f"{name} renamed", changed
    if how == "add" and isinstance(holder, dict):
        extra = rng.choice(sorted(HOSTILE_KEYS))
        holder[extra] = HOSTILE_KEYS[extra]
        return f"{extra} added beside {name}", changed
    if how == "swap":
        other = rng.choice(places)
        holder[key] = copy.deepcopy(_holder(tree, other)[other[-1]])
        return f"{name} holds the value of {'.'.join(map(str, other))}", changed
    holder[key] = rng.choice(WRONG)
    return f"{name} = {str(holder[key])[:40]!r}", changed


#: Keys that mean something to Transformers or OpenCLIP, with hostile values.
HOSTILE_KEYS: dict[str, Any] = {
    "auto_map": {
        name: "planted.Planted"
        for name in ("AutoConfig", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
    }
    | {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
    "trust_remote_code": True,
    "custom_pipelines": {"planted": {"impl": "planted.Planted", "pt": ["AutoModel"]}},
    "chat_template": "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
    "_name_or_path": PLANTED_URL,
    "num_hidden_layers": 10**9,
    "depth": 2**31,
    "vocab_size": 10**12,
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "text_config": {},
    "model_type": ESCAPE,
    "dtype": ESCAPE,
    "<img src=x onerror=alert(1)>": 1,
}

#: Python that a hostile directory brings: it leaves a file beside itself if it runs.
PLANTED_CODE = """\
import pathlib
pathlib.Path(__import__("os").environ["PLANTED"]).touch()
class Planted:
    def __new__(cls, *args, **kwargs):
        raise ValueError("planted code ran")
"""


def _bombs(rng: random.Random) -> Mutation:
    kinds = [
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" + b"1," * 2_000_000 + b"1]",
        b'{"a": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe\x00",
        b"null",
        b"",
        b'"' + ESCAPE.encode() + b'"',
    ]
    return Mutation("a bomb", rng.choice(kinds))


def json_file(rng: random.Random, data: bytes, another_answer: str = "") -> Mutation:
    """Damage a JSON file: mostly its values, sometimes its bytes."""
    if rng.random() < 0.2:
        found = rng.choice([truncated, flipped, spliced])(rng, data)
    elif rng.random() < 0.1:
        found = _bombs(rng)
    else:
        how, tree = change_tree(rng, json.loads(data))
        found = Mutation(how, json.dumps(tree).encode())
    return Mutation(found.how, found.data, another_answer)


_ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_YAML_BOMBS = [
    _ALIASES,
    _ALIASES + "vision_tokenizer: *j\n",
    "a: &a [*a]\n",
    "family: !!python/object/apply:os.system ['touch $PLANTED']\n",
    "family: !!python/name:os.system\n",
    "family: !!binary '////'\n",
    "[" * 20_000,
    "a: " + "{b: " * 5_000,
    "? [a]\n: b\n",
    "family: llava\nfamily: flamingo\n",
    "family: 0x" + "f" * 100_000,
    "--- a\n--- b\n",
    "\x00",
    f'family: "{json.dumps(ESCAPE)[1:-1]}"\n',
]


def yaml_file(rng: random.Random, data: bytes) -> Mutation:
    """Damage a YAML file. The user's settings changed, so that another answer is right."""
    if rng.random() < 0.15:
        found = rng.choice([truncated, flipped, spliced])(rng, data)
    elif rng.random() < 0.2:
        found = Mutation("a bomb", rng.choice(_YAML_BOMBS).encode())
    else:
        how, tree = change_tree(rng, yaml.safe_load(data))
        found = Mutation(how, yaml.safe_dump(tree, allow_unicode=False).encode())
    return Mutation(found.how, found.data, "the composition is another one")


# -- weights -----------------------------------------------------------------------------------------------------------


def safetensors(rng: random.Random, data: bytes) -> Mutation:
    """Damage a safetensors file: its length, its header, its tensors."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.choice(["bytes", "length", "name", "entry", "entry", "entry", "tree", "values", "truncate"])
    if how == "bytes":
        return flipped(rng, data, 0, 8 + size)
    if how == "length":
        value = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1])
        return Mutation(f"a header of {value} bytes", value.to_bytes(8, "little") + data[8:])
    if how == "values":
        found = flipped(rng, data, 8 + size)
        return Mutation(found.how, found.data, "a weight's value changed; only --verify and the doctor compare those")
    if how == "truncate":
        return truncated(rng, data)
    if how == "tree":
        how, header = change_tree(rng, header)
    else:
        name = rng.choice([name for name in header if name != "__metadata__"])
        how = _change_entry(rng, header, name, rename=how == "name")
    text = json.dumps(header).encode()
    return Mutation(how, len(text).to_bytes(8, "little") + text + tensors)


def _change_entry(rng: random.Random, header: dict[str, Any], name: str, *, rename: bool) -> str:
    entry = header[name]
    if rename:
        new = rng.choice([name + ESCAPE, "", "../" + name, name.upper(), "x" * 50_000, "vision_tokenizer.more"])
        header[new] = header.pop(name)
        return f"{name} called {new[:40]!r}"
    key = rng.choice(["dtype", "shape", "data_offsets", "delete"])
    if key == "delete":
        del header[name]
        return f"{name} deleted"
    start, end = entry["data_offsets"]
    values: dict[str, list[Any]] = {
        "dtype": ["F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "nothing", ESCAPE, 5],
        "shape": [[], [0], [-1], [10**6, 10**6], [2**63], [*entry["shape"], 1], [1.5], ESCAPE],
        "data_offsets": [[0, 0], [end, start], [0, 2**63], [start + 1, end + 1], [start], [-1, end]],
    }
    entry[key] = rng.choice(values[key])
    return f"{name}: {key} {str(entry[key])[:40]!r}"


class _Planted:
    """What it is unpickled to: a call that leaves a file."""

    def __reduce__(self) -> Any:
        return (exec, ("import os, pathlib; pathlib.Path(os.environ['PLANTED']).touch()",))


def torch_file(rng: random.Random, data: bytes) -> Mutation:
    """Damage a file of `torch.save`: its zip archive, or another pickle in its place."""
    how = rng.choice(["truncate", "flip", "splice", "pickle", "pickle in a list", "opcode", "zip", "kind"])
    if how == "truncate":
        return truncated(rng, data)
    if how == "pickle":
        return Mutation("a pickle that runs code", pickle.dumps(_Planted(), protocol=rng.choice([0, 2, 4])))
    if how == "pickle in a list":
        return Mutation("a pickle that runs code", pickle.dumps({"weight": [_Planted()]}, protocol=2))
    if how == "opcode":
        opcodes = [b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.", b"\x80\x04" + b"(" * 10_000, b"\x80\x02}q\x00."]
        return Mutation("a pickle by hand", rng.choice(opcodes))
    if how == "zip":
        return Mutation("an archive without members", b"PK\x05\x06" + bytes(18))
    if how == "kind":
        return Mutation("a file of another kind", rng.choice([b"", b"GGUF" + bytes(100), b"not weights", b"\x93NUMPY"]))
    found = (flipped if how == "flip" else spliced)(rng, data)
    return Mutation(found.how, found.data, "a weight's value changed")


# -- GGUF --------------------------------------------------------------------------------------------------------------

#: Keys with one number of 4 bytes after the key and its type.
_GGUF_NUMBERS = {
    b"llama.block_count": "",
    b"llama.embedding_length": "",
    b"llama.feed_forward_length": "",
    b"llama.attention.head_count": "a file may state another number of heads of another size",
    b"llama.attention.head_count_kv": "",
    b"llama.context_length": "a file may state another context",
    b"llama.attention.layer_norm_rms_epsilon": "only the file says what this number was",
    b"llama.rope.freq_base": "only the file says what this number was",
    b"llama.rope.dimension_count": "only the file says what this number was",
    b"llama.vocab_size": "",
    b"tokenizer.ggml.bos_token_id": "only the file says what this number was",
    b"tokenizer.ggml.eos_token_id": "only the file says what this number was",
}


def gguf(rng: random.Random, data: bytes) -> Mutation:
    """Damage a GGUF file: its counts, its metadata, its table of tensors."""
    how = rng.choice(["truncate", "counts", "number", "number", "number", "key", "text", "array", "head", "splice"])
    if how == "truncate":
        return truncated(rng, data)
    if how == "array":  # its key, the type "array", the type of its values, their number
        key = rng.choice([b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges"])
        at, value = data.index(key) + len(key) + 8, rng.choice([0, 1, 2**20, 2**40, 2**64 - 1])
        changed = data[:at] + value.to_bytes(8, "little") + data[at + 8 :]
        return Mutation(f"{key.decode()} of {value} values", changed, "another vocabulary is another model")
    if how == "counts":  # magic, version, number of tensors, number of keys
        at, size = rng.choice([(4, 4), (8, 8), (16, 8)])
        value = rng.choice([0, 1, 2**31, 2 ** (8 * size) - 1])
        return Mutation(f"{value} at byte {at}", data[:at] + value.to_bytes(size, "little") + data[at + size :])
    if how == "number":
        key = rng.choice(sorted(_GGUF_NUMBERS))
        at = data.index(key + b"") + len(key) + 4
        value = rng.choice([0, 1, 2, 3, 5, 2**16, 2**31 - 1, 2**32 - 1])
        changed = data[:at] + struct.pack("<I", value) + data[at + 4 :]
        return Mutation(f"{key.decode()} = {value}", changed, _GGUF_NUMBERS[key])
    if how == "key":
        key = rng.choice(sorted(_GGUF_NUMBERS))
        changed = data.replace(key, b"x" * len(key), 1)
        return Mutation(f"{key.decode()} absent", changed, "what a file does not say has a default")
    if how == "text":
        old, new = rng.choice(
            [(b"llama", b"lla\x1bm"), (b"gpt2", b"gp\x1b2"), (b"blk.1", b"blk.9"), (b"blk", b"b\x1bk")]
        )
        return Mutation(f"{old!r} is {new!r}", data.replace(old, new))
    found = flipped(rng, data, 0, 600) if how == "head" else spliced(rng, data)
    return Mutation(found.how, found.data, "a number or a weight's value changed")


# -- lines of records --------------------------------------------------------------------------------------------------


def _change_record(rng: random.Random, data: bytes) -> Mutation:
    rows = data.splitlines()
    at = rng.randrange(len(rows))
    how, tree = change_tree(rng, json.loads(rows[at]))
    rows[at] = json.dumps(tree).encode()
    return Mutation(f"line {at + 1}: {how}", b"\n".join(rows) + b"\n")


def _change_line(rng: random.Random, data: bytes) -> Mutation:
    rows = data.splitlines()
    at = rng.randrange(len(rows))
    texts = [b"", b"null", b"5", b"[]", b'"text"', b"{", b"\xff\xfe", b'{"prompt": "hi"} {}', ESCAPE.encode()]
    texts += [json.dumps({"prompt": f"<image:{path}>hi", "completion": "x"}).encode() for path in PLANTED_PATHS[:2]]
    texts += [json.dumps({"prompt": f"<image:{PLANTED_URL}>hi", "completion": "x"}).encode()]
    texts += [json.dumps({"prompt": "<image>" * 1000, "images": ["a.png"], "completion": ESCAPE}).encode()]
    texts += [json.dumps({"prompt": "cat " * 20_000, "completion": "x"}).encode()]
    rows[at] = rng.choice(texts)
    return Mutation(f"line {at + 1}: {rows[at][:60]!r}", b"\n".join(rows) + b"\n")


def lines(rng: random.Random, data: bytes) -> Mutation:
    """Damage a file of records or prompts. The user asks something else, so that another answer is right."""
    how: Callable[[random.Random, bytes], Mutation] = rng.choice(
        [_change_record, _change_record, _change_record, _change_line, _change_line, truncated, flipped, spliced]
    )
    found = how(rng, data)
    return Mutation(found.how, found.data, "the rows are others")
