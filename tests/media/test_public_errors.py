"""Messages for other people tell nothing of files and folders but what the request itself names."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlm_cli.errors
from tests.support import ROOT
from vlm_cli.checkpoint.building import IncompleteWeightsError
from vlm_cli.errors import CheckpointError, CompositionError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader

SECRET = b"root:x:0:0:root:/root:/bin/bash\n"


def error_of(folder: Path, source: str) -> MediaError:
    with pytest.raises(MediaError) as caught:
        MediaLoader(folder).load(source)
    return caught.value


@pytest.mark.parametrize(
    ("data", "public"),
    [
        (SECRET, "'a' is not an image that Pillow can read (text). Give a PNG, JPEG, WebP or the like."),
        (b"%PDF-secret", "'a' is not an image that Pillow can read (a PDF). Give a PNG, JPEG, WebP or the like."),
        (b"\x01\x02secret", "'a' is not an image that Pillow can read. Give a PNG, JPEG, WebP or the like."),
        # Pillow quotes the word that it finds.
        (b"P3\nsecret1 4 255\n", "'a' is damaged or cut short. Fetch or save it again."),
    ],
)
def test_the_content_of_a_file_is_for_the_user_alone(data: bytes, public: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    error = error_of(tmp_path, "a")
    assert error.public == public
    assert len(str(error)) > len(public) and re.search("root:x|secret|x02", str(error))


def test_the_names_in_a_folder_are_for_the_user_alone(tmp_path: Path) -> None:
    (tmp_path / "salaries.png").touch()
    (tmp_path / "link.png").symlink_to("/nowhere/salaries.png")
    for source, public in (
        ("salarie.png", "cannot find 'salarie.png'."),
        ("salaries.png/x", "cannot find 'salaries.png/x'."),
        ("link.png", "cannot find 'link.png'."),
        (".", "'.' is a directory. Give one of its files."),
    ):
        error = error_of(tmp_path, source)
        assert error.public == public and "salaries.png" in str(error)


def test_other_errors_say_what_everybody_may_know() -> None:
    assert PromptError("the prompt is empty.").public == "the prompt is empty."
    assert CheckpointError("'/home/me/key' holds b'x'").public == "a file of the model cannot be read or written."
    assert CompositionError(["depth: 'secret'", "b"]).public == "the composition is not valid."
    assert CheckpointError("secret", public="cut").public == "cut" and str(CheckpointError("secret")) == "secret"


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(MediaError("local", public="public")))
    assert (type(error), str(error), error.public) == (MediaError, "local", "public")


def test_every_kind_of_error_has_been_decided() -> None:
    """What may quote files has a public message of its own kind; the others quote the request alone."""
    kinds = {x for x in vars(vlm_cli.errors).values() if isinstance(x, type) and issubclass(x, VLMError)}
    quoting = {kind.__name__ for kind in kinds | {IncompleteWeightsError} if kind.public_default is None}
    assert quoting == {
        "VLMError", "UsageError", "UnknownNameError", "PromptError", "MediaError", "ContextError", "LanguageModelLimit",
        "ChatTemplateError", "EndlessTemplateError",
    }  # fmt: skip


# -- every message that a row can get ----------------------------------------------------------------------------------

#: Attributes of a caught error that quote nothing of a file.
HARMLESS = ("strerror",)


def leaks(source: str) -> Iterator[str]:
    """Yield the errors of a module whose public message quotes what another error says, or bytes of a file."""
    tree = ast.parse(source)
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("MediaError", "VLMError", "PromptError")):
            continue
        public = next((x.value for x in node.keywords if x.arg == "public"), node.args[0])
        if any(_is_content(x, caught) for x in ast.walk(public)):
            yield ast.unparse(node)


def _is_content(node: ast.AST, caught: set[str]) -> bool:
    if not isinstance(node, ast.FormattedValue):
        return False
    value = node.value
    if isinstance(value, ast.Attribute) and value.attr in HARMLESS:
        return False
    names = {x.id for x in ast.walk(value) if isinstance(x, ast.Name)}
    functions = {x.id for x in names_of_calls(value)}
    return bool(names & (caught | {"data", "first", "reason"})) or bool(functions & {"_list_names", "_explain_missing"})


def names_of_calls(value: ast.AST) -> list[ast.Name]:
    return [x.func for x in ast.walk(value) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)]


def test_no_public_message_quotes_another_error() -> None:
    folders = ("media", "generation")
    paths = [path for folder in folders for path in sorted((ROOT / "vlm_cli" / folder).rglob("*.py"))]
    assert len(paths) > 8
    assert {path.name: found for path in paths if (found := list(leaks(path.read_text("utf-8"))))} == {}


@pytest.mark.parametrize(
    "statement",
    [
        'raise MediaError(f"{name} cannot be read: {error}.")',
        'raise MediaError(f"{name} is {str(error) or 1}", public=f"{error.args}")',
        'raise MediaError(f"it begins with {data[:12]!r}")',
        'raise MediaError(f"it holds {_list_names(folder)}")',
    ],
)
def test_a_public_message_that_leaks_is_found(statement: str) -> None:
    assert list(leaks(f"try: pass\nexcept OSError as error: {statement}"))
    mended = statement.replace("public=f", "local=f")[:-1] + ", public=name)"
    assert not list(leaks(f"try: pass\nexcept OSError as error: {mended}"))
