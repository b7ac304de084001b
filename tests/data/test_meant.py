"""Pictures that are plainly meant: refused under another key, and told of where a text names a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.meant import check_picture_keys, find_mentions, mention_note, mention_notes
from vlm_cli.errors import PromptError
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, Text, parse


@pytest.mark.parametrize(
    "more",
    [
        {"image": "red.png"},
        {"image": ["red.png"]},
        {"Images": ["red.png"]},
        {"image_path": "red.png"},
        {"image_url": {"url": "red.png"}},
        {"img": "red.png"},
        {"input_image": "red.png"},
        {"video": "a.mp4"},
        {"images": [], "picture_files": ["red.png"]},
        {"image": "red.png", "images": ["blue.png"]},
    ],
)
def test_a_key_that_names_pictures_is_refused(more: dict[str, Any]) -> None:
    words = 'clips as a list: "videos": ' if "video" in more else 'pictures as a list: "images": '
    with pytest.raises(RecordError, match=f"is not read. Give {words}"):
        check_picture_keys({"prompt": "What is it?", **more}, ["What is it?"])


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["red.png"]},
        {"image": "red.png", "images": ["red.png"]},
        {"image_id": 7, "image_width": 640},
        {"image": None, "video": ""},
        {"imagery": "poetic", "source": "red.png", "mediation": "x"},
    ],
)
def test_other_keys_are_left_alone(more: dict[str, Any]) -> None:
    check_picture_keys({"prompt": "What is it?", **more}, ["What is it?"])
    check_picture_keys({"image": "red.png"}, ["<image:red.png>What is it?"])


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Describe red.png.", ["red.png"]),
        ('Is "blue.png" like (red.png), or red.png?', ["blue.png", "red.png"]),
        ("<image:red.png>What does red.png show?", []),
        ("See gone.png, train.jsonl and red", []),
        (r"\<image:red.png> is text", []),
        ("a\0.png", []),
        ("Watch clip.mp4, or <video:clip.mp4>", []),
        ("Watch clip.mp4!", ["clip.mp4"]),
    ],
)
def test_words_that_name_pictures_are_found(folder: Path, prompt: str, found: list[str]) -> None:
    (folder / "clip.mp4").touch()
    parts = [part for part in parse(prompt) if isinstance(part, (Text, Medium))]
    assert find_mentions(parts, MediaLoader(folder)) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("<IMAGE> Describe it", ["<IMAGE>"]),
        ("<img/>, <picture> and <img/>", ["<img/>", "<picture>"]),
        ("<image >a<images>", ["<image >", "<images>"]),
        (r"the tag \<image>, <imagery>, <b> and <image", []),
        ("<image:red.png>What is it?", []),
    ],
)
def test_tags_that_are_no_placeholders_are_found(folder: Path, prompt: str, found: list[str]) -> None:
    parts = parse(prompt)
    assert find_mentions(parts, MediaLoader(folder)) == found
    assert all(f"Note: the prompt has {tag}, which is read as text." in mention_note(tag) for tag in found)


def test_each_kind_of_mention_is_told_once() -> None:
    mentions = [(2, "a.png"), (3, "<IMAGE>"), (5, "<img>"), (5, "<IMAGE>"), (7, "<img>")]
    of_file, of_tag = mention_notes([(f"line {line} of x", name) for line, name in mentions])
    assert of_file.startswith("Note: line 2 of x names the picture file 'a.png'") and "more" not in of_file
    assert of_tag.startswith("Note: line 3 of x has <IMAGE>,") and of_tag.endswith(" 2 more lines do the same.")
    assert mention_notes([]) == []


def test_a_prompt_that_is_a_file_name_is_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match=r'write "<image:red\.png>Describe the image\."'):
        find_mentions([Text(" red.png\n")], MediaLoader(folder))
    assert find_mentions([Text("gone.png")], MediaLoader(folder)) == []
    (folder / "clip.mp4").touch()
    with pytest.raises(PromptError, match=r'name of a clip.*write "<video:clip\.mp4>What happens\?"'):
        find_mentions([Text("clip.mp4")], MediaLoader(folder))


def test_files_outside_of_the_media_root_are_not_looked_for(folder: Path, tmp_path: Path) -> None:
    parts = [Text(f"Describe {folder / 'red.png'} now")]
    assert find_mentions(parts, MediaLoader(media_root=tmp_path)) == []
    assert find_mentions(parts, MediaLoader(media_root=folder)) == [str(folder / "red.png")]
