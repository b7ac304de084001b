"""Rows of other projects, at random, and slow readings of them, written from what their own training code does.

A reading is a list of turns, each the role and the text, in which ⟦FILE⟧ stands for a picture.
"""

from __future__ import annotations

from random import Random
from typing import Any, TypeAlias

from vlm_cli.data.record import Content
from vlm_cli.prompt import Medium

Reading: TypeAlias = list[tuple[str, str]]

#: What stands in texts: placeholders, what only looks like them, and what vlm's own grammar would read.
PIECES = (
    "a cat",
    " ",
    "\n",
    "<image>",
    "<image>",
    "<image:x.png>",
    "<video>",
    "\\<image>",
    "<IMAGE>",
    "<img:x>",
    "\\",
    "<",
)


def flatten(content: Content) -> Reading:
    """What vlm has read."""
    turns = [
        (
            "assistant" if segment.is_target else "user",
            "".join(f"⟦{part.source}⟧" if isinstance(part, Medium) else part.text for part in segment.parts),
        )
        for segment in content.segments
    ]
    return [("system", content.system), *turns] if content.system else turns


def random_text(random: Random, pieces: tuple[str, ...] = PIECES) -> str:
    return "".join(random.choices(pieces, k=random.randint(1, 6)))


def random_conversation(random: Random) -> dict[str, Any]:
    """A row of LLaVA's in which each placeholder of a question has its file."""
    questions = [random_text(random) for _ in range(random.randint(1, 3))]
    plain = tuple(x for x in PIECES if "<image>" not in x)
    turns = [
        turn
        for question in questions
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": random_text(random, plain) + "."})
    ]
    if random.random() < 0.2:
        turns.insert(0, {"from": "gpt", "value": "Hello."})
    files = [f"{k}.png" for k in range(sum(x.count("<image>") for x in questions))]
    row: dict[str, Any] = {"id": "7", "conversations": turns}
    if len(files) == 1 and random.random() < 0.5:
        row["image"] = files[0]
    elif files:
        row["image"] = files
    return row


def read_conversation_slowly(row: dict[str, Any], *, moves: bool = True, skips: bool = True) -> Reading:
    """Read a row as LLaVA's training code does, without the modules of vlm.

    It drops a first turn that is not the human's. In each turn with one placeholder that does not come first, it
    deletes the placeholder, strips what is left, and puts the placeholder and a line end in front. Pictures are taken
    in order.

    Args:
        row: of the data set.
        moves: whether a single placeholder moves.
        skips: whether an answer before the first question is dropped.
    """
    files = row.get("image", [])
    left = [files] if isinstance(files, str) else list(files)
    turns = row["conversations"]
    if skips and turns[0]["from"] != "human":
        turns = turns[1:]
    read: Reading = []
    for turn in turns:
        text = turn["value"]
        if moves and text.count("<image>") == 1 and text.index("<image>") > 0:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        while "<image>" in text:
            text = text.replace("<image>", f"⟦{left.pop(0)}⟧", 1)
        read.append(({"human": "user", "gpt": "assistant"}[turn["from"]], text))
    return read


def random_texts(random: Random) -> dict[str, Any]:
    """A row of FineVision."""
    pairs = [{"user": random_text(random), "assistant": random_text(random) + "."} for _ in range(random.randint(1, 3))]
    return {"images": [f"{k}.png" for k in range(random.randint(0, 3))], "texts": pairs, "source": "x"}


def read_texts_slowly(row: dict[str, Any], *, first: bool = True) -> Reading:
    """Read a row as nanoVLM does: one string for all pictures, in front of the first question.

    Args:
        row: of the data set.
        first: whether the string stands in front, and not behind.
    """
    read = [(role, pair[role]) for pair in row["texts"] for role in ("user", "assistant")]
    pictures = "".join(f"⟦{name}⟧" for name in row["images"])
    read[0] = ("user", pictures + read[0][1] if first else read[0][1] + pictures)
    return read


def random_messages(random: Random) -> dict[str, Any]:
    """A row with messages in parts, with pictures in parts and beside them, in order or by number."""
    files: list[str] = []
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] * random.randint(0, 1)
    numbered = random.random() < 0.5
    for turn in range(random.randint(1, 3)):
        parts: list[dict[str, Any]] = []
        for _ in range(random.randint(1, 4)):
            choice = random.randrange(4)
            if choice == 0:
                parts.append({"type": "image", "text": None, "index": len(files) if numbered else None})
                files.append(f"{len(files)}.png")
            elif choice == 1:
                parts.append({"type": "image_url", "image_url": {"url": f"in-{turn}.png", "detail": "low"}})
            else:
                parts.append({"type": "text", "text": random_text(random), "index": None})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": random_text(random) + "."}]
    return {"messages": messages, **({"images": files} if files else {})}


def read_messages_slowly(row: dict[str, Any], *, in_order: bool = True) -> Reading:
    """Read a row as a chat template writes it: part after part, the pictures beside the messages in order.

    Args:
        row: of the data set.
        in_order: whether the first picture comes first, and not last.
    """
    files = list(row.get("images", ()))
    read: Reading = []
    for message in row["messages"]:
        content = message["content"]
        written = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                written += part["text"]
            elif part["type"] == "image_url":
                written += f"⟦{part['image_url']['url']}⟧"
            else:
                written += f"⟦{files.pop(0 if in_order else -1)}⟧"
        read.append((message["role"], written))
    return read
